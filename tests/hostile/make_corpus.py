"""Files that are broken, absurd or made to do harm: for each kind of file that is read, a generator of (name, content).

Everything is made from a few whole files and a seed, so that a failure can be made again by its name. None of them may
do more than be refused: what a payload would run, if it ran, is to make the file `marker`.

    python tests/hostile/make_corpus.py FOLDER      # writes them all, to look at
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, from whichever folder this is run

from tests.hostile.checkpoint_files import checkpoints, safetensors
from tests.hostile.config_files import configs
from tests.hostile.damage import Corpus
from tests.hostile.image_files import images, indexes, lines, png_of
from tests.hostile.sample_files import SAMPLE, arrays, tars


def everything(marker: Path) -> dict[str, Corpus]:
    """Each kind of file, and its corpus."""
    return {
        "checkpoint": checkpoints(marker),
        "safetensors": safetensors(),
        "npy": arrays(marker),
        "shard": tars(SAMPLE),
        "images": tars([("0.png", png_of(2, 2, data=bytes(14))), ("0.txt", b"tom")]),
        "image": images(),
        "metadata": lines(),
        "index": indexes(),
        "config": configs(marker),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for kind, corpus in everything(folder / "marker").items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, data in corpus:
            (folder / kind / name.translate(dict.fromkeys(map(ord, "/\\\0"), "_"))).write_bytes(data)


if __name__ == "__main__":
    main()
