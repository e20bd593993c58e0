"""Files from before PyTorch 1.6 give the tensors that torch gives, also where they lie in views of storages."""

import io
import random

import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict
from ldm.util import UserError
from tests.ldm.checkpoint.legacy_files import Layout, Storage, legacy_file, random_legacy
from tests.ldm.checkpoint.sample_tensors import same

DATA = torch.arange(12.0)


def view(offset, size, name="v", numel=None):
    return Storage("0", DATA, (name, offset, size), numel)


@pytest.mark.parametrize("mmap", [True, False])
def test_load_legacy_reads_a_view_from_its_own_offset(mmap, tmp_path):
    path = tmp_path / "old.ckpt"
    path.write_bytes(legacy_file({"w": Layout(view(4, 6), 1, (2, 2), (2, 1))}, [Storage("0", DATA)]))
    assert load_checkpoint(path, mmap=mmap)["w"].tolist() == [[5.0, 6.0], [7.0, 8.0]]


@pytest.mark.parametrize("seed", range(150))
def test_load_legacy_agrees_with_torch_on_every_layout(seed, tmp_path):
    path = tmp_path / "old.ckpt"
    path.write_bytes(random_legacy(random.Random(seed)))
    expected = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["state_dict"]
    for mmap in (True, False):
        found = load_checkpoint(path, mmap=mmap)["state_dict"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert same(found[key], value), key


def test_load_legacy_keeps_what_views_share(tmp_path):
    content = {"whole": Layout(Storage("0", DATA), 0, (12,), (1,)), "part": Layout(view(4, 6), 0, (6,), (1,))}
    (tmp_path / "old.ckpt").write_bytes(legacy_file(content, [Storage("0", DATA)]))
    weights = load_state_dict(tmp_path / "old.ckpt")
    weights["part"][0] = -1.0
    assert weights["whole"][4] == -1.0


@pytest.mark.parametrize(
    "layouts",
    [
        [Layout(view(4, 6), 0, (8,), (1,))],  # beyond the view, within the storage
        [Layout(view(4, 9), 0, (1,), (1,))],  # a view beyond the storage
        [Layout(view(-1, 3), 0, (1,), (1,))],
        [Layout(view(4, -3), 0, (1,), (1,))],
        [Layout(view(4, 1 << 62), 0, (1,), (1,))],
        [Layout(view(True, 3), 0, (1,), (1,))],
        [Layout(view(4.0, 3), 0, (1,), (1,))],
        [Layout(view("4", 3), 0, (1,), (1,))],
        [Layout(Storage("0", DATA, ("v", 4)), 0, (1,), (1,))],
        [Layout(Storage("0", DATA, 7), 0, (1,), (1,))],
        [Layout(Storage("0", DATA, (["v"], 4, 3)), 0, (1,), (1,))],
        [Layout(view(4, 3), 0, (1,), (1,)), Layout(view(5, 3), 0, (1,), (1,))],  # one key, two views
        [Layout(view(4, 3), -1, (1,), (1,))],
        [Layout(view(4, 3), 2, (2,), (-1,))],
        [Layout(Storage("0", DATA, None, 11), 0, (1,), (1,))],  # another size than the data have
        [Layout(Storage("0", DATA, None, 13), 0, (1,), (1,))],
        [Layout(Storage("1", DATA), 0, (1,), (1,))],  # no such storage
        [Layout(Storage("0", DATA), 0, (1,), (1,)), Layout(Storage("0", DATA.double()), 0, (1,), (1,))],
    ],
)
def test_load_legacy_refuses_what_does_not_fit(layouts, tmp_path):
    path = tmp_path / "old.ckpt"
    path.write_bytes(legacy_file({f"w{i}": layout for i, layout in enumerate(layouts)}, [Storage("0", DATA)]))
    with pytest.raises(UserError, match=str(path)) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised tensor"),
        (lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8), "quant"),
        (lambda: torch.zeros(8, dtype=torch.uint8).view(torch.qint8), "quantised tensor"),
        (lambda: torch.eye(3).to_sparse(), "sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
        (lambda: torch.empty(3, device="meta"), "tensor without values"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_load_checkpoint_refuses_tensors_of_other_kinds_by_name(tensor, message, zipped, tmp_path):
    """To leave such a weight out would lose it."""
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(2), "x": tensor()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"model\.ckpt: has a {message}.*save its.*instead") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
