"""Model cards of the reference models."""

from __future__ import annotations

from training.loop import state_of

SOURCES = {
    "fashion-mnist": "Fashion-MNIST (Zalando SE), 60,000 training pictures padded to 32x32; MIT licence",
    "fluent-emoji": "Fluent emoji, 3D style (Microsoft), 64x64 over named background colours; MIT licence",
}


def lines(name: str, summary: str, source: str, options: object) -> list[str]:
    """The card as lines of Markdown; figures measured on the finished model stand in ``docs/zoo.md``."""
    state = state_of(options.out)  # type: ignore[attr-defined]
    command = (
        f"python -m training.{name.replace('-', '_')} --data DATA --out RUN --export FOLDER "
        f"--steps {state['steps']} --batch {options.batch} --seed {options.seed}"  # type: ignore[attr-defined]
    )
    return [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "---",
        f"# {name}",
        "",
        summary.strip(),
        "",
        "A small reference model of stepquant, meant for trying and testing quantization, not for making pictures.",
        "",
        f"- **Data:** {SOURCES[source]}.",
        f"- **Command:** `{command}`",
        f"- **Trained:** {state['step']} steps of {options.batch}, seed {options.seed}, "  # type: ignore[attr-defined]
        f"{state['seconds'] / 60:.0f} minutes on one or two threads of a 2-core AVX-512 CPU, bf16 autocast.",
        f"- **Weights:** exponential moving average, fp16; final training loss {state['loss']:.4f}.",
        "- **Licence of the weights:** Apache-2.0.",
    ]
