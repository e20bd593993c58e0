"""Tests of mixtures of releases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import ema_key, load_state_dict, open_checkpoint, save_state_dict
from ldm.checkpoint.formats import as_bytes
from ldm.release import recognition
from ldm.release.families import FAMILIES
from ldm.release.mixture import METHODS, Recipe, added_difference, mix_files, slerp, weighted_sum
from ldm.util import UserError
from tests.tiny_families import write_tiny

UNET = "model.diffusion_model."
IN, MIDDLE, VAE = f"{UNET}input_blocks.1.0.weight", f"{UNET}middle_block.0.weight", "first_stage_model.conv.weight"
LATER = f"{UNET}input_blocks.10.0.weight"
TEXT = "cond_stage_model.transformer.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def weights(seed: int, dtype: torch.dtype = torch.float32, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {key: torch.randn(4, 3, generator=generator).to(dtype) for key in (IN, MIDDLE, VAE, TEXT, LATER)}
    return {**found, "betas": torch.full((5,), float(seed)), POSITIONS: torch.arange(77)[None], **more}


def mixed(folder: Path, recipe: Recipe, *files: dict[str, Tensor], suffix: str = ".safetensors") -> dict[str, Tensor]:
    paths = [folder / f"{number}{suffix}" for number in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        save_state_dict(content, path, metadata={"modelspec.title": path.stem, "sshs_model_hash": "0"})
    out = folder / f"out{suffix}"
    mix_files(paths, out, recipe)
    return load_state_dict(out)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_mix_files_sums_and_keeps_the_rest_of_the_first(tmp_path: Path, suffix: str) -> None:
    one, two, three = (weights(seed) for seed in (1, 2, 3))
    result = mixed(tmp_path, Recipe("sum", [0.25, 0.5]), one, two, three, suffix=suffix)
    assert result.keys() == one.keys()
    for key in (IN, MIDDLE, VAE, TEXT):
        torch.testing.assert_close(result[key], 0.25 * one[key] + 0.25 * two[key] + 0.5 * three[key])
    assert torch.equal(result["betas"], one["betas"]) and torch.equal(result[POSITIONS], one[POSITIONS])
    metadata = open_checkpoint(tmp_path / f"out{suffix}").metadata
    assert metadata["modelspec.title"] == "0" and "sshs_model_hash" not in metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_mix_files_computes_wide_and_keeps_the_dtype_of_the_first(tmp_path: Path, dtype: torch.dtype) -> None:
    one, two = weights(1, dtype), weights(2)
    result = mixed(tmp_path, Recipe("sum", [0.3]), one, two)[IN]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (0.7 * one[IN].to(wide) + 0.3 * two[IN].to(wide)).to(dtype)
    assert result.dtype == dtype and torch.equal(result.to(wide), expected.to(wide))


def test_mix_files_carries_what_other_programs_put_into_one_of_them(tmp_path: Path) -> None:
    extra = {f"{UNET}position_net.linears.0.weight": torch.ones(2), f"{UNET}out.2.alpha": torch.ones(1)}
    one, two = weights(1), weights(2)
    first = mixed(tmp_path, Recipe("sum", [0.5]), {**one, **extra}, two)
    assert first.keys() == {*one, *extra} and torch.equal(first[next(iter(extra))], torch.ones(2))
    second = mixed(tmp_path, Recipe("sum", [0.5]), one, {**two, **extra})
    assert second.keys() == one.keys() and torch.equal(second[IN], first[IN])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.uint16, torch.complex64])
@pytest.mark.parametrize("place", [0, 1])
def test_mix_files_refuses_quantised_weights(tmp_path: Path, dtype: torch.dtype, place: int) -> None:
    files = [weights(1), weights(2)]
    files[place][IN] = files[place][IN].to(dtype)
    with pytest.raises(UserError, match=f"{place}.safetensors: {IN} is {dtype}; dequantise it and save it as"):
        mixed(tmp_path, Recipe("sum", [0.5]), *files)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("method", "count"), [("sum", 2), ("add-difference", 3), ("slerp", 2)])
def test_mix_files_at_alpha_0_is_the_first_bit_for_bit(tmp_path: Path, method: str, count: int) -> None:
    files = [weights(seed) for seed in range(count)]
    result = mixed(tmp_path, Recipe(method, [0.0]), *files)
    assert all(torch.equal(as_bytes(result[key]), as_bytes(value)) for key, value in files[0].items())


def test_mix_files_does_not_round_equal_weights(tmp_path: Path) -> None:
    one = weights(1)
    assert torch.equal(mixed(tmp_path, Recipe("sum", [0.3]), one, {**weights(2), TEXT: one[TEXT]})[TEXT], one[TEXT])
    same = {**weights(3), TEXT: weights(2)[TEXT]}
    assert torch.equal(mixed(tmp_path, Recipe("add-difference", [0.3]), one, weights(2), same)[TEXT], one[TEXT])


def test_weighted_sum_is_exact_at_both_ends() -> None:
    one, two = torch.tensor([1e8, -3.1]), torch.tensor([0.1, 0.7])
    assert torch.equal(weighted_sum([one, two], [0.0]), one) and torch.equal(weighted_sum([one, two], [1.0]), two)


def test_added_difference() -> None:
    values = [torch.tensor([1.0]), torch.tensor([5.0]), torch.tensor([2.0])]
    assert added_difference(values, [0.5]).item() == 2.5


def test_slerp_keeps_the_norm_between_orthogonal_tensors() -> None:
    one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    third = slerp([one, two], [1 / 3])
    torch.testing.assert_close(third, torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]]))


@pytest.mark.parametrize("other", [[3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], ids=["parallel", "opposite", "zero"])
def test_slerp_without_an_arc_is_the_weighted_sum(other: list[float]) -> None:
    values = [torch.tensor([1.0, 0.0]), torch.tensor(other)]
    torch.testing.assert_close(slerp(values, [0.25]), weighted_sum(values, [0.25]))


def test_recipe_takes_the_longest_block_of_whole_names() -> None:
    recipe = Recipe("sum", [0.5], {"input_blocks": [0.1], "input_blocks.1": [0.2], "first_stage_model": [0.0]})
    keys = (IN, LATER, MIDDLE, VAE)
    assert [recipe.alphas_of(key)[0] for key in keys] == [0.2, 0.1, 0.5, 0.0]


def test_mix_files_weighs_blocks_and_their_averages(tmp_path: Path) -> None:
    def with_averages(seed: int) -> dict[str, Tensor]:
        plain = weights(seed)
        averages = {ema_key(key): plain[key] for key in (IN, MIDDLE, LATER)}
        return {**plain, **averages, "model_ema.decay": torch.tensor(seed / 10)}

    one, two = with_averages(1), with_averages(2)
    result = mixed(tmp_path, Recipe("sum", [1.0], {"middle_block": [0.0]}), one, two)
    for key in (MIDDLE, ema_key(MIDDLE), "model_ema.decay"):
        assert torch.equal(result[key], one[key])
    assert torch.equal(result[IN], two[IN]) and torch.equal(result[ema_key(IN)], two[ema_key(IN)])


def test_mix_files_leaves_out_averages_that_one_file_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    result = mixed(tmp_path, Recipe("sum", [0.5]), weights(1, **{ema_key(IN): torch.ones(4, 3)}), weights(2))
    assert not any(key.startswith("model_ema.") for key in result)
    assert "EMA weights of" in caplog.text and "left out" in caplog.text


def test_mix_files_refuses_other_models_in_one_line(tmp_path: Path) -> None:
    plain = weights(1)
    lacking = {key: value for key, value in plain.items() if key != MIDDLE}
    for other, message in [
        (lacking, f"1.safetensors: lacks {MIDDLE}, which .*0.safetensors has; are they"),
        ({**plain, f"{UNET}extra": torch.ones(1)}, rf"0.safetensors: lacks {UNET}extra, which .*1.safetensors has"),
        ({**plain, MIDDLE: torch.ones(4, 4)}, rf"1.safetensors: {MIDDLE} has shape \(4, 4\), but \(4, 3\) in .*0.safe"),
        ({**plain, "v_pred": torch.zeros(0)}, "0.safetensors: lacks the marker v_pred, which .*1.safetensors has"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            mixed(tmp_path, Recipe("sum", [0.5]), plain, other)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_mix_files_refuses_another_prediction(tmp_path: Path) -> None:
    """SD 2 base and 768-v have the same keys, and their metadata or a folder's scheduler tells the prediction."""
    paths = [tmp_path / f"{stated}.safetensors" for stated in ("epsilon", "v")]
    for path in paths:
        save_state_dict(weights(1), path, metadata={"modelspec.prediction_type": path.stem})
    with pytest.raises(UserError, match=r"v\.safetensors: predicts v, and .*epsilon\.safetensors eps; take releases"):
        mix_files(paths, tmp_path / "out.safetensors", Recipe("sum", [0.5]))


def test_mix_files_states_no_prediction_that_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "_matching", lambda _: [FAMILIES["sd2_768_v"], FAMILIES["sd2_base"]])
    release, _ = write_tiny("sd2_base", tmp_path)
    out = tmp_path / "out.safetensors"
    mix_files([release, release], out, Recipe("sum", [0.5]))
    assert "modelspec.prediction_type" not in open_checkpoint(out).metadata
    assert "modelspec.architecture" not in open_checkpoint(out).metadata
    with pytest.raises(UserError, match=r"sd2_base\.safetensors: SD 2 predicts eps or v, which the keys do not tell"):
        mix_files([release, release], f"{tmp_path}/folder/", Recipe("sum", [0.5]))
    told = tmp_path / "told.safetensors"
    save_state_dict(load_state_dict(release), told, metadata={"modelspec.prediction_type": "epsilon"})
    mix_files([release, told], out, Recipe("sum", [0.5]))
    metadata = open_checkpoint(out).metadata
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_mix_files_refuses_unknown_blocks_and_its_own_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--block IN04: no weight begins with it"):
        mixed(tmp_path, Recipe("sum", [0.5], {"IN04": [1.0]}), weights(1), weights(2))
    with pytest.raises(UserError, match="would replace one of the files"):
        mix_files(
            [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "1.safetensors", Recipe("sum", [1])
        )


def test_mix_files_refuses_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    one, two = (
        {**weights(seed, torch.float16), TEXT: torch.full((4, 3), 6e4 * sign).half()}
        for seed, sign in ((1, 1), (2, -1))
    )
    with pytest.raises(UserError, match=f"{TEXT}: the mixture is not finite in torch.float16"):
        mixed(tmp_path, Recipe("sum", [-1.0]), one, two)
    assert not (tmp_path / "out.safetensors").exists()


def test_methods_know_their_numbers_of_alphas() -> None:
    assert [METHODS["sum"].alphas(4), METHODS["add-difference"].alphas(3), METHODS["slerp"].alphas(2)] == [3, 1, 1]
