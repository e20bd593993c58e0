"""`main.py --resume` of the one run in a folder: its name, which holds the time, is not known beforehand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

(run,) = Path(sys.argv[1]).iterdir()
main = Path(__file__).resolve().parents[2] / "main.py"
sys.argv = [str(main), "--resume", str(run), *sys.argv[2:]]
runpy.run_path(str(main), run_name="__main__")
