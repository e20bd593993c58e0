"""The choice among a sample's masks, and the dropping of captions and images of edits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.dropout import EditDropout
from ldm.data.stored_masks import MaskChoice
from ldm.shards import npy
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_tar

MASKS = 3
READ = ("mask", "masked_image")


def stored(number: int, size: tuple[int, int] = (4, 4)) -> list[tuple[str, bytes]]:
    """Return a sample with masks. The masked image `k` of sample `n` is 10 n + k; the mask is its first row."""
    members = sample_members(number, (8, *size))
    for k in range(MASKS):
        ending = f".{k}" if k else ""
        mask = np.zeros((1, *size), np.float16)
        mask[:, 0] = 1
        values = {"mask": mask, "masked_image": np.full((8, *size), 10 * number + k, np.float16)}
        members += [(f"{number:06d}.{key}{ending}.npy", npy.encode(value)) for key, value in values.items()]
    return members


def write_masked(folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((4, 4),)) -> str:
    """`count` samples with masks, in the `sizes` by turns; a completely masked image is -1."""
    members = [member for n in range(count) for member in stored(n, sizes[n % len(sizes)])]
    write_tar(folder / "set.tar", members)
    (folder / "null.t5.npy").write_bytes(npy.encode(np.full((7, 6), -1, np.float16)))
    for h, w in sizes:
        blank = np.full((8, h, w), -1, np.float16)
        (folder / f"null.masked_image.{h}x{w}.npy").write_bytes(npy.encode(blank))
    return str(folder / "set.tar")


def data_of(urls: str, **options) -> WebDataNpyModuleFromConfig:
    data = WebDataNpyModuleFromConfig(
        **{"batch_size": 3, "extra_keys": list(READ), "seed": 1, **options}, **urls_of(urls)
    )
    data.setup("fit")
    return data


def urls_of(urls: str) -> dict[str, str]:
    return {"training_urls": urls, "val_urls": urls}


def chosen(loader, epoch: int = 0) -> dict[int, int]:
    """Return the mask that each sample has in the epoch, -1 where the whole image is masked."""
    own = loader.batch_sampler if hasattr(loader.batch_sampler, "set_epoch") else loader.sampler
    own.set_epoch(epoch)
    found = {}
    for batch in loader:
        assert not [key for key in batch if "." in key]
        assert batch["mask"].shape[1] == 1 and batch["mask"].shape[2:] == batch["masked_image"].shape[2:]
        for key, mask, image in zip(batch["__key__"], batch["mask"], batch["masked_image"], strict=True):
            value = int(image.max())
            assert (image == value).all()
            is_full = value == -1
            assert mask.all() if is_full else mask[:, 0].all() and not mask[:, 1:].any()
            assert is_full or value // 10 == int(key)
            found[int(key)] = -1 if is_full else value % 10
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_MaskChoice_follows_from_seed_epoch_and_sample(tmp_path: Path, workers: int) -> None:
    urls = write_masked(tmp_path, 30, ((4, 4), (2, 8)))
    loader = data_of(urls, num_workers=workers).train_dataloader()
    epochs = [chosen(loader, epoch) for epoch in range(4)]
    assert epochs == [chosen(data_of(urls, batch_size=5).train_dataloader(), epoch) for epoch in range(4)]
    counts = Counter(mask for epoch in epochs for mask in epoch.values())
    assert set(counts) == {-1, 0, 1, 2} and 15 < counts[-1] < 45  # a quarter of 120
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 4
    assert epochs[0] != chosen(data_of(urls, seed=2).train_dataloader())


def test_full_mask_share_is_that_of_the_config(tmp_path: Path) -> None:
    urls = write_masked(tmp_path)
    assert set(chosen(data_of(urls, full_mask_share=1.0).train_dataloader()).values()) == {-1}
    assert -1 not in chosen(data_of(urls, full_mask_share=0).train_dataloader()).values()
    for share in (-0.1, 1.1):
        with pytest.raises(UserError, match=r"data\.params\.full_mask_share"):
            data_of(urls, full_mask_share=share)


def test_validation_has_the_first_mask(tmp_path: Path) -> None:
    data = data_of(write_masked(tmp_path))
    assert set(chosen(data.val_dataloader()).values()) == {0}


def test_a_missing_or_unfitting_blank_is_told_of_before_training(tmp_path: Path) -> None:
    urls, blank = write_masked(tmp_path), tmp_path / "null.masked_image.4x4.npy"
    blank.write_bytes(npy.encode(np.ones((4, 4, 4), np.float16)))
    with pytest.raises(UserError, match=r"4x4\.npy: shape \(4, 4, 4\)"):
        data_of(urls).train_dataloader()
    blank.unlink()
    with pytest.raises(UserError, match=r"4x4\.npy: not found, and full_mask_share needs it"):
        data_of(urls).train_dataloader()
    assert len(data_of(urls, full_mask_share=0.0).train_dataloader()) == 2


def test_masks_of_streams(tmp_path: Path) -> None:
    urls = f"pipe:cat {write_masked(tmp_path)}"
    with pytest.raises(UserError, match=r"full_mask_share .*null_cond_path"):
        data_of(urls).train_dataloader()
    data = data_of(urls, null_cond_path=str(tmp_path / "null.t5.npy"), null_cond_dropout=0.5)
    found = [chosen(data.train_dataloader(), epoch) for epoch in range(6)]
    assert {mask for epoch in found for mask in epoch.values()} == {-1, 0, 1, 2}
    assert found[0] == chosen(data.train_dataloader())


def test_masks_of_a_prior_are_chosen_too(tmp_path: Path) -> None:
    """The two sets may differ in their number of masks."""
    training = write_masked(tmp_path / "a")
    members = [m for m in stored(7) if ".1.npy" not in m[0] and ".2.npy" not in m[0]]
    prior = write_tar(tmp_path / "b/set.tar", members)
    (tmp_path / "b/null.masked_image.4x4.npy").write_bytes(npy.encode(np.full((8, 4, 4), -1, np.float16)))
    data = data_of(training, prior_urls=str(prior), full_mask_share=0.5)
    found = [chosen(data.train_dataloader(), epoch) for epoch in range(4)]
    assert {epoch[7] for epoch in found} <= {-1, 0}
    assert {mask for epoch in found for mask in epoch.values()} == {-1, 0, 1, 2}


def test_MaskChoice_leaves_everything_else_alone() -> None:
    sample = {"f8": 1, "t5": 2, "mask": np.zeros((1, 2, 2)), "masked_image": np.zeros((8, 2, 2)), "txt": "a"}
    assert MaskChoice(1)(dict(sample), 0, 0) == sample


def test_EditDropout_drops_the_caption_the_image_or_both() -> None:
    """5 % each of the samples lose the caption alone, the image alone, and both (arXiv:2211.09800, section 3.2.1)."""
    dropout, counts = EditDropout({"t5": "null"}, 0.05, seed=0), Counter()
    for number in range(20_000):
        image = np.ones(2)
        sample = dropout({"t5": "t5", "txt": "a", "edit": image, "f8": 1}, 0, number)
        assert (sample["t5"] == "null") == (sample["txt"] == "") and image.all() and sample["f8"] == 1
        counts[sample["txt"] == "", not sample["edit"].any()] += 1
    shares = {kind: count / 20_000 for kind, count in counts.items()}
    expected = {(True, False): 0.05, (False, True): 0.05, (True, True): 0.05, (False, False): 0.85}
    assert shares == pytest.approx(expected, abs=0.006)


def test_edits_are_dropped_by_the_share_of_the_model(tmp_path: Path) -> None:
    members = [m for n in range(40) for m in sample_members(n)]
    members += [(f"{n:06d}.edit.npy", npy.encode(np.ones((4, 4, 4), np.float16))) for n in range(40)]
    ordered = sorted(members, key=lambda member: member[0])
    write_tar(tmp_path / "set.tar", ordered)
    (tmp_path / "null.t5.npy").write_bytes(npy.encode(np.full((7, 6), -1, np.float16)))
    data = WebDataNpyModuleFromConfig(40, str(tmp_path / "set.tar"), val_urls=str(tmp_path / "set.tar"), seed=0)
    model = SimpleNamespace(dropout=0.3, conditioning_entries=("t5", "edit"))
    facts = {"local_rank": 0, "global_rank": 0, "world_size": 1, "overfit_batches": 0}
    data.trainer = SimpleNamespace(lightning_module=model, **facts)
    data.setup("fit")
    [batch], [validation] = data.train_dataloader(), data.val_dataloader()
    no_text, no_image = (batch["t5"] == -1).flatten(1).all(1), ~batch["edit"].flatten(1).any(1)
    kinds = Counter(zip(no_text.tolist(), no_image.tolist(), strict=True))
    assert all(5 < kinds[kind] < 20 for kind in ((True, False), (False, True), (True, True)))
    assert (validation["t5"] != -1).all() and validation["edit"].all()
