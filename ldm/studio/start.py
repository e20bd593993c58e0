"""Start of the studio: the checks of its options, and the set-up of the server. Imports no gradio by itself."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.fields import default_fields
from ldm.studio.job_store import PASSWORD
from ldm.util import UserError, refuse_if

_LEAST_LETTERS = 8  # of a password
_SPECIAL = re.compile(r"[%{}*?\[\]:]")  # have a meaning in names of shards


def start_studio(
    folders: Sequence[Path],
    host: str,
    port: int,
    work: Path,
    demo: bool,
    environment: Mapping[str, str],
    say: Callable[[str, str], None],
) -> None:
    """Serve the studio until Ctrl-C. The arguments are the options of `tools/studio.py`.

    Raises:
        UserError: an option is wrong, or the password is missing.
    """
    password = environment.get(PASSWORD)
    if not is_loopback(host) and not password:
        raise UserError(f"--host {host}: other machines could run commands here; set a password in the environment "
                        f"variable {PASSWORD}")  # fmt: skip
    refuse_if(
        password is not None and len(password) < _LEAST_LETTERS,
        f"{PASSWORD}: has fewer than {_LEAST_LETTERS} letters; choose a longer password",
    )
    refuse_if(
        _SPECIAL.search(str(work)), f"--work {work}: has a letter with a meaning in names of shards, one of %{{}}*?[]:"
    )
    values = default_fields(demo)
    # The first values may lie elsewhere: the data of the demo, and a link to the release at its usual place.
    given = [Path(values[name]) for name in ("images", "release") if values[name]]
    allowed = AllowedFolders([Path.cwd(), *folders], given)
    card, memory = detect_card()
    work.mkdir(parents=True, exist_ok=True)
    allowed.add(work)
    without_network(work / "gradio")

    from ldm.studio.server import serve
    from ldm.studio.studio import Studio

    studio = Studio(allowed, work, {**values, **({"card": memory} if card else {})}, card)
    serve(studio, host, port, password, lambda address: say("studio: %s", address))


def is_loopback(host: str) -> bool:
    """Return True if `host` is an address or name of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_network(temporary: Path) -> None:
    """Set the environment so that Gradio asks no server, and keeps its files in `temporary`. Call before its import."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(temporary.absolute())


def detect_card() -> tuple[str, float]:
    """Return the name and the memory in GB of the first NVIDIA card, an empty name if none is found."""
    line = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20)
        name, memory = done.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), round(float(memory) / 1024, 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return "", 0.0
