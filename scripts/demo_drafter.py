"""Train the demo drafter from nothing but its target; repeat the command to go on.

python scripts/demo_drafter.py configs/demo/cpu.yaml
python scripts/demo_drafter.py configs/demo/gpu.yaml run.max_minutes=12
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dflare.errors import DFlareError
from dflare.training.run.pipeline import run_pipeline


def main(
    config: Annotated[Path, typer.Argument(help="configs/demo/cpu.yaml or gpu.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value of the training configuration.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Data, snapshots, logs.")] = Path("runs/demo"),
    output: Annotated[Path, typer.Option(help="The drafter, its card and evaluation.")] = Path(
        "assets/smollm2-135m-dflare"
    ),
) -> None:
    """Generate data, train, evaluate, export."""
    try:
        run_pipeline(config, work, output, overrides or [])
    except DFlareError as error:
        print(f"demo_drafter: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
