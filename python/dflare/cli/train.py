"""`dflare train`: train a drafter from a YAML configuration."""

from pathlib import Path
from typing import Annotated

import typer

from dflare.cli.app import app


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, over the file's settings.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the snapshot in run.output.")
    ] = False,
) -> None:
    """Train a drafter and export it to OUTPUT/drafter.

    On several GPUs: torchrun --nproc-per-node 8 --no-python dflare train CONFIG.yaml
    """
    from dflare.training.run.config import load_config

    parsed = load_config(config, overrides)
    from dflare.training.run.loop import train
    from dflare.training.run.trainer import Trainer

    train(Trainer(parsed, resume=resume))
