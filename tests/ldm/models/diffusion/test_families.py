"""SD 2, inpainting, depth, upscaling and InstructPix2Pix against the golden cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.models.diffusion.guidance import guided_output
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.golden_data import case, cases, reference, relative_error, seeded_tensor
from tests.ldm.models.diffusion.golden_v2 import build_v2, conditioning_of, dropped, without_noise


def conditioning(name: str) -> dict[str, Any]:
    spec, cond = case(name), conditioning_of(name)
    if "low_scale" in spec:
        low = instantiate_from_config({key: spec["low_scale"][key] for key in ("target", "params")})
        shape, level = spec["low_scale"]["shape"], torch.tensor(spec["low_scale"]["noise_level"])
        noise = seeded_tensor(f"{name}/lr_noise", shape)
        cond |= {"c_concat": [low.q_sample(seeded_tensor(f"{name}/lr", shape), level, noise=noise)], "c_adm": level}
    if "dropout" in spec:
        null = seeded_tensor(f"{name}/null", (1, *spec["cond"]["c_crossattn"][1:]))
        cond = dropped(cond, null, spec["dropout"]["text_dropped"], spec["dropout"]["image_dropped"])
    return cond


@pytest.mark.parametrize("name", cases("p_losses", 2))
def test_golden_p_losses_of_families(name: str) -> None:
    spec, cond = case(name), conditioning(name)
    model = build_v2(name).train()
    t, shape = torch.tensor(spec["t"]), spec["x_shape"]
    with torch.no_grad():
        out = model.apply_model(seeded_tensor(f"{name}/x_T", shape), t, cond)
    assert relative_error(out, reference(name, "out")) < 1e-5
    noise = seeded_tensor(f"{name}/noise", shape)
    loss, logged = model.p_losses(seeded_tensor(f"{name}/x_start", shape), cond, t, noise=noise)
    assert loss.item() == pytest.approx(spec["loss"], rel=1e-5)
    assert {key: logged[key].item() for key in spec["loss_dict"]} == pytest.approx(spec["loss_dict"], rel=1e-5)
    loss.backward()
    norms = {key: p.grad.norm().item() for key, p in model.model.diffusion_model.named_parameters()}
    assert norms == pytest.approx(spec["grad_norm"], rel=1e-3, abs=1e-7 * max(spec["grad_norm"].values()))


@pytest.mark.parametrize("name", [name for name in cases("p_losses", 2) if "guidance" in case(name)])
def test_golden_guided_output_with_two_scales(name: str) -> None:
    spec, cond = case(name), conditioning_of(name)
    model, null = build_v2(name).eval(), seeded_tensor(f"{name}/null", (1, *spec["cond"]["c_crossattn"][1:]))
    first = {key: [entry[:1] for entry in entries] for key, entries in conditioning(name).items()}
    nothing = dropped(first, null, [True], [True])
    x, t = seeded_tensor(f"{name}/x_T", spec["x_shape"])[:1], torch.tensor(spec["t"][-1:])
    scales = spec["guidance"]["text_scale"], spec["guidance"]["image_scale"]
    with torch.no_grad():
        out = guided_output(model, x, t, first, nothing, *scales)
    assert relative_error(out, reference(name, "guided")) < 5e-5
    assert cond["c_concat"][0].shape[1] == 4


@pytest.mark.parametrize("name", cases("concat_input", 2))
def test_golden_encode_conditioning_with_maps(name: str) -> None:
    spec = case(name)
    model, batch = without_noise(build_v2(name)).eval(), {}
    for key, entry in spec["batch"].items():
        if entry["as"] == "image":
            batch[key] = seeded_tensor(f"{name}/{key}", entry["shape"], 0.5).clamp(-1, 1)
        elif entry["as"] == "mask":
            batch[key] = (seeded_tensor(f"{name}/{key}", entry["shape"]) > 0).float()
        elif entry["as"] == "masked":
            batch[key] = batch[entry["image"]] * (batch[entry["mask"]] < 0.5)
        else:
            batch[key] = seeded_tensor(f"{name}/{key}", entry["shape"])
    with torch.no_grad():
        cond = model.encode_conditioning(batch)
    assert relative_error(torch.cat(cond["c_concat"], dim=1), reference(name, "c_concat")) < 1e-5
    assert torch.equal(cond["c_crossattn"][0], batch[spec["params"]["cond_stage_key"]])
    assert torch.isfinite(model.train().shared_step(batch)[0])


@pytest.mark.parametrize("name", cases("sampler", 2))
def test_golden_samplers_of_v_prediction_with_vectors(name: str) -> None:
    spec, model = case(name), build_v2(name).eval()
    for key, path in spec["samplers"].items():
        samples, _ = get_obj_from_str(path)(model).sample(
            S=spec["steps"], batch_size=spec["batch"], shape=spec["shape"], conditioning=conditioning_of(name),
            unconditional_conditioning=conditioning_of(name, "un"), eta=spec["eta"], verbose=False,
            unconditional_guidance_scale=spec["unconditional_guidance_scale"],
            x_T=seeded_tensor(f"{name}/x_T", (spec["batch"], *spec["shape"])),
        )  # fmt: skip
        assert relative_error(samples, reference(name, key)) < 1e-4, key


@pytest.mark.parametrize("name", cases("zero_snr", 2))
def test_golden_rescale_betas_zero_snr(name: str) -> None:
    model, expected = build_v2(name, rescale_betas_zero_snr=True), reference(name, "alphas_cumprod")
    torch.testing.assert_close(model.alphas_cumprod.double(), expected.double(), rtol=1e-5, atol=1e-9)
    assert model.alphas_cumprod[-1] == 0
    x, noise = seeded_tensor(f"{name}/x_start", (1, 4, 8, 8)), seeded_tensor(f"{name}/noise", (1, 4, 8, 8))
    t = torch.tensor([999])
    assert torch.equal(model.q_sample(x, t, noise), noise) and torch.equal(model.get_v(x, noise, t), -x)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("ip2p_input", 2))
def test_golden_encode_conditioning_of_edits(name: str) -> None:
    spec, model = case(name), without_noise(build_v2(name)).eval()
    rows, prompts = spec["rows"], spec["prompts"]
    images = seeded_tensor(f"{name}/image", (len(prompts), *spec["image_shape"]), 0.5).clamp(-1, 1)
    images = images.repeat(rows // len(prompts), 1, 1, 1)
    captions = prompts * (rows // len(prompts))
    torch.manual_seed(0)
    with torch.no_grad():
        cond = model.encode_conditioning({"edited": images, "edit": {"c_concat": images, "c_crossattn": captions}})
    text, image, null = cond["c_crossattn"][0], cond["c_concat"][0], reference(name, "null")
    no_text, no_image = (text - null).flatten(1).norm(dim=1) < 1e-3, image.flatten(1).norm(dim=1) == 0
    kinds = {"text": no_text & ~no_image, "image": no_image & ~no_text, "both": no_text & no_image}
    shares = {kind: rows.float().mean().item() for kind, rows in kinds.items()}
    assert shares == pytest.approx(spec["shares"], abs=spec["shares_tolerance"])
    for index in range(len(prompts)):
        kept = slice(index, None, len(prompts))
        assert relative_error(text[kept][~no_text[kept]][0], reference(name, "context")[index]) < 1e-5
        assert relative_error(image[kept][~no_image[kept]][0], reference(name, "mean")[index]) < 1e-5
