"""The gallery as a Gradio page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio

from stepquant.errors import StepquantError
from stepquant.progress import Progress
from stepquant.recipes import RECIPES
from stepquant.ui.gallery import MAX_IMAGES, Gallery, Job

HEADERS = ["", "full precision", "quantized"]


class GradioProgress(Progress):
    """Shows tasks in the progress bar of Gradio."""

    def __init__(self, bar: gradio.Progress) -> None:
        self.bar = bar

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.bar((done, total), desc=description)

        self.bar((0, total), desc=description)
        yield advance


def build(gallery: Gallery) -> gradio.Blocks:
    """Create the page."""

    def generate(
        model: str,
        recipe: str,
        bits: str,
        prompt: str,
        seed: float,
        steps: float,
        count: float,
        bar: gradio.Progress = gradio.Progress(),  # noqa: B008 - Gradio requires it here
    ) -> tuple[Any, Any, list[list[str]]]:
        try:
            job = Job(model, recipe, bits, prompt, int(seed), int(steps), int(count))
            result = gallery.run(job, GradioProgress(bar))
        except StepquantError as error:
            raise gradio.Error(str(error)) from None
        return result.full_precision, result.quantized, [list(row) for row in result.rows]

    # Nothing leaves this machine: no analytics, no share link.
    with gradio.Blocks(title="stepquant", analytics_enabled=False) as page:
        gradio.Markdown("# stepquant\nFull-precision and quantized images from the same noise.")
        with gradio.Row():
            model = gradio.Dropdown(list(gallery.models), value=next(iter(gallery.models)), label="model")
            recipe = gradio.Dropdown(
                list(RECIPES),
                value="minmax",
                label="recipe",
                info=RECIPES["minmax"].summary(),
            )
            bits = gradio.Dropdown(
                ["w8a8", "w6a6", "w4a8", "w4a4", "w4a16"], value="w4a8", label="bits", allow_custom_value=True
            )
        prompt = gradio.Textbox(label="prompt", info="for a text-to-image model; default: the prompts of the model")
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0, minimum=0)
            steps = gradio.Slider(1, 100, value=20, step=1, label="denoising steps")
            count = gradio.Slider(1, MAX_IMAGES, value=4, step=1, label="images")
        button = gradio.Button("Generate", variant="primary")
        with gradio.Row():
            full = gradio.Image(label="full precision", format="png")
            quantized = gradio.Image(label="quantized", format="png")
        table = gradio.Dataframe(headers=HEADERS, label="cost and fidelity")
        button.click(
            generate, [model, recipe, bits, prompt, seed, steps, count], [full, quantized, table], api_name="generate"
        )
    return page


def launch(gallery: Gallery, host: str, port: int, *, wait: bool = True) -> gradio.Blocks:
    """Serve the page until interrupted, or return immediately; raises `StepquantError` if the address is in use."""
    page = build(gallery)
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            prevent_thread_lock=not wait,
        )
    except OSError as error:
        raise StepquantError(f"cannot serve at {host}:{port}: {error}. Choose another `port`.") from None
    return page
