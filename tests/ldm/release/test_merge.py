"""A merged release: trained weights from the training, every other bit from the release."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoint import (
    Pending,
    ema_key,
    load_checkpoint,
    load_state_dict,
    open_checkpoint,
    save_checkpoint,
    save_state_dict,
)
from ldm.checkpoint.formats import as_bytes
from ldm.release import recognition
from ldm.release.families import FAMILIES
from ldm.release.graft import graft
from ldm.release.merge import merge, merge_files
from ldm.util import UserError

SHAPES = {
    "model.diffusion_model.out.0.weight": (3, 2),
    "model.diffusion_model.out.0.bias": (3,),
    "first_stage_model.conv.weight": (4,),
    "cond_stage_model.transformer.weight": (5,),
    "betas": (7,),
}
MODEL = [key for key in SHAPES if key.startswith("model.")]
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def release(dtype=torch.float32, ema=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    weights = {key: value if key == "betas" else value.to(dtype) for key, value in weights.items()}
    if ema:
        weights |= {ema_key(key): weights[key] * 2 for key in MODEL}
        weights |= {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(9, dtype=torch.int)}
    return {**weights, POSITIONS: torch.arange(77)[None]}


def training(dtype=torch.float32, ema=False, cond_stage=False, start=None, steps=1):
    """The state dict of a training that began from the release and moved the weights below `model.`."""
    start = start or release()
    weights = {key: start[key].to(dtype) for key in SHAPES if cond_stage or not key.startswith("cond_stage_model.")}
    for key in MODEL:
        weights[key] = weights[key] + steps
    if cond_stage:
        weights["cond_stage_model.transformer.weight"] = weights["cond_stage_model.transformer.weight"] + steps
    if ema:
        weights |= {ema_key(key): weights[key] - 0.5 * steps for key in MODEL}
        weights |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(1, dtype=torch.int)}
    return weights


def values(merged):
    return {key: v.compute() if isinstance(v, Pending) else v for key, v in merged.state_dict.items()}


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def test_trained_weights_come_from_the_training_and_the_rest_from_the_release():
    merged = merge(training(), release())
    weights = values(merged)
    assert list(weights) == list(release())
    for key, value in weights.items():
        assert identical(value, training()[key] if key in MODEL else release()[key]), key
    assert (merged.kind, merged.trained, merged.averaged) == ("raw", MODEL, [])


def test_a_cond_stage_that_was_trained_is_taken():
    key = "cond_stage_model.transformer.weight"
    trained = training(cond_stage=True)
    assert identical(values(merge(trained, release()))[key], trained[key])


def test_an_untouched_release_is_bit_identical_whatever_the_trainings_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        merged = merge(training(dtype, steps=0, cond_stage=True), release())
        assert all(identical(value, release()[key]) for key, value in values(merged).items())
        assert merged.trained == []


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_parts_that_a_narrow_tier_has_rounded_are_not_trained(narrow):
    """If float32 training continues one in a narrow type, the rounded parts beside the UNet are the release's."""
    trained = {key: value.float() for key, value in training(narrow, steps=0, cond_stage=True).items()}
    trained[MODEL[0]] = release()[MODEL[0]].to(narrow).float() + 0.123
    trained[MODEL[0]][0, 0] = release()[MODEL[0]][0, 0].to(narrow)  # by chance, in a trained weight
    merged = merge(trained, release())
    assert merged.trained == MODEL[:1]
    for key, value in values(merged).items():
        assert identical(value, trained[key] if key == MODEL[0] else release()[key]), key


@pytest.mark.parametrize("half", [False, True])
def test_elements_that_a_narrow_training_left_alone_are_not_rounded(half):
    key = "cond_stage_model.transformer.weight"
    trained = training(torch.bfloat16, steps=0, cond_stage=True)
    trained[key][2] = 7
    merged = values(merge(trained, release(), half=half))[key]
    expected = torch.where(torch.arange(5) == 2, torch.tensor(7.0), release()[key])
    assert identical(merged, expected.half() if half else expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_take_the_releases_dtype(dtype):
    weights = values(merge(training(), release(dtype)))
    for key in MODEL:
        assert torch.equal(weights[key], training()[key].to(dtype))
    assert weights["betas"].dtype == torch.float32


def test_the_average_is_taken_where_there_is_one():
    trained = training(ema=True)
    for choice, kind in [(None, "ema"), ("ema", "ema"), ("raw", "raw")]:
        merged = merge(trained, release(), weights=choice)
        assert merged.kind == kind
        for key in MODEL:
            assert identical(values(merged)[key], trained[ema_key(key) if kind == "ema" else key])
        assert list(merged.state_dict) == list(release())


def test_an_average_is_not_made_up():
    with pytest.raises(UserError, match=r"no moving average.*--weights raw"):
        merge(training(), release(), weights="ema")


@pytest.mark.parametrize("choice", ["ema", "raw"])
def test_a_releases_own_average_becomes_the_trainings(choice):
    trained = training(ema=True)
    merged = merge(trained, release(ema=True), weights=choice)
    for key in MODEL:
        assert identical(values(merged)[ema_key(key)], trained[ema_key(key)])
    assert values(merged)["model_ema.num_updates"] == 1
    assert "4 EMA weights" in "\n".join(merged.summary())


def test_a_releases_own_average_becomes_the_weights_where_training_has_none():
    merged = merge(training(), release(ema=True))
    for key in MODEL:
        assert identical(values(merged)[ema_key(key)], training()[key])
    untouched = merge(training(steps=0), release(ema=True))
    assert all(identical(value, release(ema=True)[key]) for key, value in values(untouched).items())


def test_half_halves_the_weights_and_leaves_schedule_and_integers():
    weights = values(merge(training(), release(), half=True))
    for key, value in weights.items():
        expected = torch.float32 if key == "betas" else torch.int64 if key == POSITIONS else torch.float16
        assert value.dtype == expected
        source = training()[key] if key in MODEL else release()[key]
        assert torch.equal(value, source.to(expected))


def test_diverged_weights_are_refused_by_name():
    for bad in (float("nan"), float("inf")):
        trained = training()
        trained[MODEL[1]][1] = bad
        with pytest.raises(UserError, match=f"{MODEL[1]} has values that are not finite"):
            values(merge(trained, release()))


def test_weights_too_large_for_float16_are_refused_by_name():
    trained = training()
    trained[MODEL[0]][0, 0] = 1e6
    for arguments in ({"release": release(), "half": True}, {"release": release(torch.float16)}):
        with pytest.raises(UserError, match=f"{MODEL[0]} has values too large for torch.float16"):
            values(merge(trained, **arguments))


@pytest.mark.parametrize(
    ("trained", "released", "message"),
    [
        ({MODEL[0]: torch.ones(2, 2)}, {}, r"shape \(2, 2\) in the training, \(3, 2\) in the release"),
        ({"model.extra": torch.ones(2)}, {}, "the release lacks model.extra"),
        ({}, {"model.extra": torch.ones(2)}, "the training lacks model.extra"),
        ({}, {"first_stage_model.extra": torch.ones(2)}, "the training lacks first_stage_model.extra"),
        ({"cond_stage_model.new": torch.ones(2)}, {}, "the release lacks cond_stage_model.new"),
        *(
            (
                {},
                {MODEL[0]: torch.ones(3, 2, dtype=kind)},
                f"is torch.float32 in the training, {kind} in the release; de",
            )
            for kind in (torch.int8, torch.uint8, torch.bool, torch.int64, torch.uint16, torch.complex64)
        ),
    ],
)
def test_another_architecture_is_refused(trained, released, message):
    with pytest.raises(UserError, match=message):
        merge({**training(), **trained}, {**release(), **released})


def test_parts_that_training_lacks_stay():
    """Training on latents may do without a first stage."""
    trained = {key: value for key, value in training().items() if not key.startswith("first_stage_model.")}
    weights = values(merge(trained, release()))
    assert identical(weights["first_stage_model.conv.weight"], release()["first_stage_model.conv.weight"])


WIDE_AND_NARROW = [torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.float64, torch.complex64, torch.bool, torch.uint16]


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW)
def test_merge_takes_weights_of_every_dtype(dtype):
    released = {key: (4 * value.abs() + 1).to(dtype) if key in MODEL else value for key, value in release().items()}
    trained = {**training(), **{key: released[key].clone() for key in MODEL}}
    trained[MODEL[0]] = torch.zeros_like(released[MODEL[0]])
    merged = merge(trained, released)
    assert merged.trained == [MODEL[0]]
    assert identical(values(merged)[MODEL[0]], trained[MODEL[0]])
    assert identical(values(merged)[MODEL[1]], released[MODEL[1]])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_share_of_the_change_is_merged_into_weights_of_8_bits(dtype):
    released = {key: value.to(dtype) if key in MODEL else value for key, value in release().items()}
    trained = {**training(), MODEL[0]: released[MODEL[0]].float() + 1}
    merged = values(merge(trained, released, strength=0.5))[MODEL[0]]
    assert identical(merged, (released[MODEL[0]].float() + 0.5).to(dtype))


def test_merge_refuses_nan_in_a_dtype_that_torch_cannot_reduce():
    released = {key: value.to(torch.float8_e4m3fn) if key in MODEL else value for key, value in release().items()}
    trained = {**training(), MODEL[0]: torch.full_like(training()[MODEL[0]], torch.nan)}
    with pytest.raises(UserError, match=rf"{MODEL[0]} has values that are not finite"):
        values(merge(trained, released))


def test_merge_into_a_dtype_that_torch_does_not_convert_is_one_line():
    packed = torch.zeros(release()[MODEL[0]].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(UserError, match=r"torch cannot convert .*float4"):
        values(merge(training(), {**release(), MODEL[0]: packed}))


@pytest.mark.parametrize("source", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("out", ["merged.ckpt", "merged.safetensors"])
def test_merge_files_keeps_the_metadata_of_the_release(files, source, out, tmp_path):
    metadata = {"modelspec.title": "Cats é", "ss_steps": "3", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "1"}
    save_state_dict(release(), tmp_path / source, metadata=metadata)
    merge_files(files[0], tmp_path / source, tmp_path / out, None, False)
    kept = open_checkpoint(tmp_path / out).metadata
    if out.endswith(".safetensors"):
        with safe_open(tmp_path / out, framework="pt") as file:
            assert file.metadata() == kept
        assert kept.pop("modelspec.hash_sha256") != "0x1" and kept.pop("modelspec.date")
    assert {**kept, "format": "pt"} == {"format": "pt", "modelspec.title": "Cats é", "ss_steps": "3"}


floats = st.floats(-1000, 1000, width=16)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16])] * 2),
    moved=st.sets(st.sampled_from([key for key in SHAPES if key != "betas"])),
)
def test_whatever_moved_is_taken_and_whatever_did_not_is_kept(data, dtypes, moved):
    released = {
        key: torch.tensor(data.draw(st.lists(floats, min_size=3, max_size=3)), dtype=dtypes[0]) for key in SHAPES
    }
    trained = {key: value.to(dtypes[1]) for key, value in released.items()}
    for key in moved:
        trained[key] = trained[key] + torch.tensor([0.0, 64.0, 0.0], dtype=dtypes[1])
    merged = merge(trained, released)
    for key, value in values(merged).items():
        if key in moved:
            here = torch.tensor([False, True, False])  # where it moved: elsewhere nothing is rounded
            assert torch.equal(value, torch.where(here, trained[key].to(dtypes[0]), released[key]))
        else:
            assert value is released[key]
    assert set(merged.trained) == moved


@settings(max_examples=30, deadline=None)
@given(
    ema=st.booleans(),
    released_ema=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16])] * 2),
)
def test_a_hack_followed_by_a_merge_gives_the_release(ema, released_ema, dtypes):
    released = release(dtypes[0], ema=released_ema)
    hacked = values(graft(training(dtypes[1], ema=ema), released, "r"))
    merged = values(merge(hacked, released, weights="raw"))
    assert merged.keys() == released.keys()
    for key, value in merged.items():
        if not key.startswith("model_ema."):
            assert identical(value, released[key]), key


@pytest.fixture
def files(tmp_path):
    """A training checkpoint and a release."""
    content = {"state_dict": training(), "global_step": 5, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    save_checkpoint({**content, "callbacks": {}}, tmp_path / "last.ckpt")
    save_state_dict(release(), tmp_path / "model.ckpt")
    return tmp_path / "last.ckpt", tmp_path / "model.ckpt"


@pytest.mark.parametrize("name", ["out/merged.ckpt", "merged.safetensors"])
def test_the_merged_file_holds_weights_alone_at_the_releases_size(files, name, tmp_path):
    merge_files(*files, tmp_path / name, None, False)
    assert load_state_dict(tmp_path / name).keys() == release().keys()
    assert load_checkpoint(tmp_path / name).keys() <= {"state_dict", "metadata"}
    for key, value in load_state_dict(tmp_path / name).items():
        assert identical(value, training()[key] if key in MODEL else release()[key])
    if name.endswith(".ckpt"):
        assert (tmp_path / name).stat().st_size == files[1].stat().st_size
    else:
        assert load_file(tmp_path / name).keys() == release().keys()


def test_nothing_half_written_is_left(files, tmp_path):
    trained = training()
    trained[MODEL[1]][0] = torch.nan
    save_checkpoint({**load_checkpoint(files[0]), "state_dict": trained}, files[0])
    (tmp_path / "merged.ckpt").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"last\.ckpt.*model\.ckpt.*not finite"):
        merge_files(*files, tmp_path / "merged.ckpt", None, False)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "merged.ckpt").read_bytes() == b"old"


def test_the_files_to_merge_are_not_overwritten(files):
    for out in files:
        with pytest.raises(UserError, match="choose another --out"):
            merge_files(*files, out, None, False)


def test_a_release_is_no_training_checkpoint(files, tmp_path):
    with pytest.raises(UserError, match="not a training checkpoint"):
        merge_files(files[1], files[1], tmp_path / "merged.ckpt", None, False)


def test_a_training_checkpoint_is_no_release(files, tmp_path):
    with pytest.raises(UserError, match=r"last\.ckpt: a training checkpoint .*give the released weights"):
        merge_files(files[0], files[0], tmp_path / "merged.ckpt", None, False)
    pruned = {"state_dict": release(), "global_step": 9, "loops": {}, "callbacks": {}, "lr_schedulers": []}
    save_checkpoint(pruned, files[1])  # as the releases of 2022 are
    merge_files(*files, tmp_path / "merged.ckpt", None, False)


def test_the_summary_has_no_empty_lines():
    lines = merge(training(), release()).summary()
    assert len(lines) == 2 and not any(line.startswith("0 ") for line in lines)


@pytest.mark.parametrize(
    ("markers", "noted", "zero_snr", "expected"),
    [
        ((), None, False, set()),
        ((), "eps", False, set()),
        (("v_pred", "ztsnr"), None, False, {"v_pred", "ztsnr"}),
        (("v_pred", "ztsnr"), "v", True, {"v_pred", "ztsnr"}),
        ((), "v", False, {"v_pred"}),
        ((), "v", True, {"v_pred", "ztsnr"}),
        (("v_pred",), "eps", False, set()),
        (("v_pred", "ztsnr"), "v", False, {"v_pred"}),
    ],
)
def test_merge_files_marks_what_was_trained(files, tmp_path, monkeypatch, caplog, markers, noted, zero_snr, expected):
    caplog.set_level("INFO")
    monkeypatch.setattr(recognition, "_matching", lambda shapes: [FAMILIES["sdxl"]])
    alphas = torch.tensor([0.9, 0.0 if zero_snr else 0.1])
    content = {**load_checkpoint(files[0]), "state_dict": {**training(), "alphas_cumprod": alphas}}
    save_checkpoint(content if noted is None else {**content, "parameterization": noted}, files[0])
    save_state_dict({**release(), **{marker: torch.zeros(0) for marker in markers}}, files[1])
    merge_files(*files, tmp_path / "merged.safetensors", None, False)
    merged = load_state_dict(tmp_path / "merged.safetensors")
    assert merged.keys() - release().keys() == expected
    assert (f"the training predicts {noted}" in caplog.text) == (set(markers) != expected)


def test_merge_files_refuses_another_family(files, tmp_path, monkeypatch):
    families = iter(["sdxl", "sd1"])
    monkeypatch.setattr(recognition, "_matching", lambda shapes: [FAMILIES[next(families)]])
    with pytest.raises(UserError, match=r"model\.ckpt: is Stable Diffusion XL, the training is of Stable Diffusion 1;"):
        merge_files(*files, tmp_path / "merged.safetensors", None, False)
    assert not (tmp_path / "merged.safetensors").exists()


def test_strength_is_the_share_of_the_trainings_change():
    start = release(torch.float16, ema=True)
    trained = training(ema=True, start=start)
    for strength in (0, 0.25, 1, 1.5):
        found = values(merge(trained, start, strength=strength))
        for key in (*MODEL, *map(ema_key, MODEL)):
            target = trained[key if key.startswith("model_ema.") else ema_key(key)]
            expected = ((1 - strength) * start[key].float() + strength * target).half()
            assert identical(found[key], expected), (key, strength)
        unmoved = [key for key in start if not key.startswith(("model.", "model_ema."))]
        assert all(identical(found[key], start[key]) for key in unmoved)
        assert found["model_ema.decay"] == trained["model_ema.decay"]


def test_merge_files_warns_of_another_release_than_the_trainings(files, tmp_path, caplog):
    note = {"name": str(files[1]), "sha256": hashlib.sha256(files[1].read_bytes()).hexdigest()}
    save_checkpoint({**load_checkpoint(files[0]), "release": note}, files[0])
    save_state_dict(release(seed=9), tmp_path / "other.ckpt")
    merge_files(*files, tmp_path / "merged.ckpt", None, False)
    assert "started from" not in caplog.text
    merge_files(files[0], tmp_path / "other.ckpt", tmp_path / "merged.ckpt", None, False, strength=0.5)
    assert f"other.ckpt: differs from {files[1]}, which the training started from" in caplog.text
