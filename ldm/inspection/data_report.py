"""Report on a data set, as text: the lines and columns that `inspect_shards` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.printable import escaped

_BAR, _WIDTH = 40, 100  # characters: longest bar, longest caption
_SHOWN = 5  # entries per list


def format_inspection(found: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    """Return the result `found` of `inspect` as paragraphs of text. `index` is the set's index."""
    return "\n\n".join(
        [
            _counts(found, index),
            f"stored shapes\n{_bars(found['shapes'])}",
            *([_masks(found["loss_masks"])] if found["loss_masks"] else []),
            _originals(found["originals"]),
            _captions(found["captions"]),
            _duplicates(found["duplicates"]),
            _latents(found["latents"]),
        ]
    )


def _counts(found: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    counts = f"{_counted(found['samples'], 'sample')} in {_counted(found['shards'], 'shard')}"
    lines = [f"{counts}, {found['bytes'] / 1e6:.1f} MB"]
    if found["mirrored"]:
        lines[0] += f"; {_counted(found['mirrored'], 'mirror image')} included"
    failed = index.get("failed") or []
    if failed:
        lines.append(f"{_counted(len(failed), 'image')} could not be read, such as {escaped(_failure(**failed[0]))}")
    lines += [f"{label}: {escaped(str(index[key]))}" for key, label in _INDEX_FIELDS if index.get(key) is not None]
    return "\n".join(lines)


def _failure(name: str, reason: str, **_: Any) -> str:
    """Return `NAME: REASON`; a reason that begins with the name is returned unchanged."""
    return reason if reason.startswith(f"{name}:") else f"{name}: {reason}"


_INDEX_FIELDS = (
    ("format", "format"),
    ("autoencoder", "autoencoder"),
    ("text_tower", "text tower"),
    ("text_tower_2", "second text tower"),
    ("scale_factor", "scale factor"),
    ("variants", "variants per image, of which the first is inspected"),
    ("max_tokens", "tokens per caption"),
    ("clip_skip", "clip skip"),
)


def _masks(masks: Mapping[str, Any]) -> str:
    head = (
        f"loss masks by their white share; mean {masks['mean']:.0%}; "
        f"{masks['white']} white, which train the whole image; {masks['black']} black"
    )
    return f"{head}\n{_bars(masks['areas'])}"


def _originals(originals: Mapping[str, Any]) -> str:
    if not originals["known"]:
        return "originals: the samples have no record of their sizes"
    enlarged = f"{originals['enlarged']} of {originals['known']} were enlarged"
    return f"originals by shorter side in pixels; {enlarged}\n{_bars(originals['shorter_side'])}"


def _captions(captions: Mapping[str, Any]) -> str:
    head = (
        f"captions by length in tokens; median {captions['tokens_median']:g}, mean {captions['tokens_mean']:.1f}, "
        f"maximum {captions['tokens_max']}; {captions['empty']} empty; "
        f"{captions['truncated']} truncated to {captions['token_limit']} tokens"
    )
    return f"{head}\n{_bars(captions['tokens'])}\nlongest: {escaped(_short(captions['longest']))}"


def _duplicates(duplicates: Mapping[str, Any]) -> str:
    captions, latents = duplicates["captions"], duplicates["latents"]
    shared = sum(entry["samples"] for entry in captions)
    lines = [f"{_counted(len(captions), 'caption')} used more than once, by {_counted(shared, 'image')}"]
    lines += [f"  {entry['samples']} x {_short(entry['caption'])!r}" for entry in captions[:_SHOWN]]
    equal = _counted(sum(map(len, latents)), "sample")
    lines.append(f"{_counted(len(latents), 'latent')} stored more than once, in {equal}")
    lines += [f"  {escaped(' = '.join(keys[:_SHOWN]))}" for keys in latents[:_SHOWN]]
    return "\n".join(lines)


def _latents(latents: Mapping[str, Any]) -> str:
    rows = [("all", latents["mean"], latents["std"])]
    rows += zip(map(str, range(99)), latents["channel_mean"], latents["channel_std"], strict=False)
    lines = ["latents as training samples them, before scaling", f"{'channel':>8}{'mean':>10}{'std':>10}"]
    lines += [f"{name:>8}{mean:>10.4f}{std:>10.4f}" for name, mean, std in rows]
    if latents["expected_std"] is not None:
        expected = latents["expected_std"]
        lines.append(
            f"the model expects a std of {expected:.4f} (1 / scale factor); "
            f"measured / expected: {latents['std'] / expected:.2f}"
        )
    return "\n".join(lines)


def _bars(counts: Mapping[str, int]) -> str:
    """Return one line per entry of a histogram: name, bar and count."""
    most, width = max(counts.values()), max(map(len, counts))
    return "\n".join(f"  {name:>{width}} {'#' * -(-count * _BAR // most)} {count}" for name, count in counts.items())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
