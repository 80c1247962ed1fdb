"""``stepquant ui``: a gallery in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.output import check_writable_folder
from stepquant.errors import StepquantError


def ui(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models to choose from; default: the zoo.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to; with the default, only this machine can open the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 7860,
    folder: Annotated[Path, typer.Option(help="Folder for the quantized models.")] = Path("out/ui"),
) -> None:
    """Serve a page that quantizes models and shows images."""
    from stepquant import zoo
    from stepquant.loading import ZOO_PREFIX, locate
    from stepquant.ui.gallery import Gallery

    try:
        from stepquant.ui.app import launch
    except ImportError:
        raise StepquantError("Gradio is not installed; run pip install 'stepquant[ui]'.") from None
    sources = models or [ZOO_PREFIX + name for name in zoo.names()]
    named = {Path(source.removeprefix(ZOO_PREFIX)).name: source for source in sources}
    for source in sources:
        locate(source)
    check_writable_folder(folder)
    typer.echo(f"http://{host}:{port}")
    launch(Gallery(named, folder), host, port)
