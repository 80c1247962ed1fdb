"""Model cards of the reference models."""

from __future__ import annotations

import argparse

from training.loop import plans_of, state_of

SOURCES = {
    "fashion-mnist": "Fashion-MNIST (Zalando SE), 60,000 training images padded to 32x32; MIT licence",
    "fluent-emoji": "Fluent emoji, 3D style (Microsoft), 64x64 over named background colours; MIT licence",
}


def card(name: str, summary: str, source: str, options: argparse.Namespace) -> str:
    """Return the card as Markdown.

    Args:
        summary: description of the model in one or two sentences.
        source: a key of `SOURCES`.
    """
    state = state_of(options.out)
    given = {"vae": "VAE_RUN", "text": "EMOJI_LDM", "teacher": "EMOJI_LDM"}
    sources = "".join(f" --{name} {what}" for name, what in given.items() if name in options)
    start = " --init FOLDER" if options.init else ""
    command = (
        f"python -m training.{name.replace('-', '_')} "
        f"--data DATA{sources}{start} --out RUN --export FOLDER "
        f"--steps {state['step']} --batch {options.batch} --learning-rate {options.learning_rate} --seed {options.seed}"
    )
    plans = plans_of(options.out)
    changed = ", ".join(f"{total} until step {last}" for total, last in plans)
    lines = [
        "---",
        "license: apache-2.0",
        f"library_name: {'pytorch' if name == 'fashion-classifier' else 'diffusers'}",
        "---",
        f"# {name}",
        "",
        summary.strip().replace("``", "`"),
        "",
        "A small reference model of stepquant: real and quick to quantize, but not meant for making images.",
        "",
        f"- **Data:** {SOURCES[source]}.",
        f"- **Command:** `{command}`",
        f"- **Trained:** {state['step']} steps of {options.batch}, seed {options.seed}, in "
        f"{state['seconds'] / 60:.0f} minutes of wall time on one thread of a busy 2-core CPU, AdamW.",
        *(["- **Start:** weights of a previous, shorter run of the same command."] if start else []),
        *([f"- **Plan:** the total behind the cosine learning rate was changed: {changed}."] if len(plans) > 1 else []),
        f"- **Weights:** exponential moving average, fp16; training loss {state['loss']:.4f} at the end.",
        "- **Licence of the weights:** Apache-2.0.",
    ]
    return "\n".join(lines) + "\n"
