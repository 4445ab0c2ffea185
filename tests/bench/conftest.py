import sys
from pathlib import Path

for folder in ("serving", "kernels"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / folder))
