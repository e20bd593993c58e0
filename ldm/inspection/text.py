"""What an inspection found, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.util import escaped

_BAR, _SHOWN, _WIDTH = 40, 5, 100  # characters of the longest bar; entries of a list; characters of a caption


def inspection_text(found: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Paragraphs of `inspect`'s result; `about` is the set's index."""
    return "\n\n".join(
        [
            _counts(found, about),
            f"stored shapes\n{_bars(found['shapes'])}",
            _originals(found["originals"]),
            _captions(found["captions"]),
            _duplicates(found["duplicates"]),
            _latents(found["latents"]),
        ]
    )


def _counts(found: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    counts = f"{_counted(found['samples'], 'sample')} in {_counted(found['shards'], 'shard')}"
    lines = [f"{counts}, {found['bytes'] / 1e6:.1f} MB"]
    if found["mirrored"]:
        lines[0] += f"; {_counted(found['mirrored'], 'mirror image')} among them"
    failed = about.get("failed") or []
    if failed:
        lines.append(f"{_counted(len(failed), 'image')} could not be read, such as {escaped(_failure(**failed[0]))}")
    lines += [f"{what}: {escaped(str(about[key]))}" for key, what in _SAID if about.get(key) is not None]
    return "\n".join(lines)


def _failure(name: str, reason: str, **_: Any) -> str:
    """The reason, with the name before it unless it begins with that already."""
    return reason if reason.startswith(f"{name}:") else f"{name}: {reason}"


_SAID = (
    ("format", "format"),
    ("autoencoder", "autoencoder"),
    ("text_tower", "text tower"),
    ("text_tower_2", "second text tower"),
    ("scale_factor", "scale factor"),
)


def _originals(originals: Mapping[str, Any]) -> str:
    if not originals["known"]:
        return "originals: the samples do not say"
    enlarged = f"{originals['enlarged']} of {originals['known']} had to be enlarged"
    return f"originals by their shorter side, in pixels; {enlarged}\n{_bars(originals['shorter_side'])}"


def _captions(captions: Mapping[str, Any]) -> str:
    head = (
        f"captions, in tokens: median {captions['tokens_median']:g}, mean {captions['tokens_mean']:.1f}, most "
        f"{captions['tokens_most']}; {captions['empty']} empty; {captions['cut']} longer than the "
        f"{captions['room']} that are read, and cut"
    )
    return f"{head}\n{_bars(captions['tokens'])}\nlongest: {escaped(_short(captions['longest']))}"


def _duplicates(duplicates: Mapping[str, Any]) -> str:
    captions, latents = duplicates["captions"], duplicates["latents"]
    shared = sum(entry["samples"] for entry in captions)
    told = f"{_counted(len(captions), 'caption')} {'is that' if len(captions) == 1 else 'are those'}"
    lines = [f"{told} of several images, {shared} in all"]
    lines += [f"  {entry['samples']} x {_short(entry['caption'])!r}" for entry in captions[:_SHOWN]]
    told = f"{_counted(len(latents), 'latent')} {'is' if len(latents) == 1 else 'are'} there more than once"
    lines.append(f"{told}, {_counted(sum(map(len, latents)), 'sample')} in all")
    lines += [f"  {escaped(' = '.join(keys[:_SHOWN]))}" for keys in latents[:_SHOWN]]
    return "\n".join(lines)


def _latents(latents: Mapping[str, Any]) -> str:
    rows = [("all", latents["mean"], latents["std"])]
    rows += zip(map(str, range(99)), latents["channel_mean"], latents["channel_std"], strict=False)
    lines = ["latents, unscaled, as training draws them", f"{'channel':>8}{'mean':>10}{'std':>10}"]
    lines += [f"{name:>8}{mean:>10.4f}{std:>10.4f}" for name, mean, std in rows]
    if latents["expected_std"] is not None:
        ratio = latents["std"] / latents["expected_std"]
        lines.append(
            f"the model expects a std of {latents['expected_std']:.4f} (1 / scale factor): this is {ratio:.2f}x"
        )
    return "\n".join(lines)


def _bars(counts: Mapping[str, int]) -> str:
    """A line a class: name, bar and count."""
    most, width = max(counts.values()), max(map(len, counts))
    return "\n".join(f"  {name:>{width}} {'#' * -(-count * _BAR // most)} {count}" for name, count in counts.items())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
