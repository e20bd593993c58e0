import gzip
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ldm.data.stream import ShardStream
from ldm.shards import npy
from ldm.shards.reader import ShardDataset
from ldm.shards.tar import index_tar, split_name
from ldm.shards.writer import ShardWriter
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_tar


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.f8.npy", ("a", "f8.npy")), ("x/y.z/b.TXT", ("x/y.z/b", "txt")), ("plain", ("plain", ""))],
)
def test_names_are_cut_as_webdataset_does(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_data(tmp_path, kind):
    long = "folder/" + "k" * (80 if kind == tarfile.USTAR_FORMAT else 300)
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        for name, data in (
            ("__meta__.json", b"{}"),
            ("._b.txt", b"what macOS adds"),
            (f"{long}.txt", b"hello"),
            (f"{long}.json", b"{}"),
            ("b.txt", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = (tmp_path / "a.tar").read_bytes()
    samples = index_tar(tmp_path / "a.tar")
    assert [sample.key for sample in samples] == [long, "b"]
    offset, size = samples[0].spans["txt"]
    assert content[offset : offset + size] == b"hello"
    assert samples[1].spans["txt"][1] == 0


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "a/../../b.txt", "a\\..\\b.txt", "\\a.txt"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [(name, b"x")])
    with pytest.raises(UserError, match="points outside") as caught:
        index_tar(path)
    assert str(path) in str(caught.value)


def test_a_member_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        index_tar(write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("a.txt", b"y")]))


def test_a_compressed_tar_is_named_as_such(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="compressed"):
        index_tar(path)


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    members = sample_members(0) + sample_members(1)
    path = write_tar(tmp_path / "a.tar", members)
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for length in [0, 1, 511, 512, 513, *range(1024, end, 256), end]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"a\.tar") as caught:
            index_tar(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_does_not_pass_for_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample_members(0) + sample_members(1))
    content = bytearray(path.read_bytes())
    second = index_tar(path)[1].spans["f8.npy"][0] - tarfile.BLOCKSIZE
    for damage in (b"\xff", b"\0"):  # zeros are what an end looks like
        content[second : second + tarfile.BLOCKSIZE] = damage * tarfile.BLOCKSIZE
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            index_tar(path)


def test_a_negative_size_does_not_send_the_reader_in_circles(tmp_path):
    info = tarfile.TarInfo("a.txt")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")  # base 256, negative
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + bytes(4096))
    with pytest.raises(UserError, match="tar"):
        index_tar(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 8191), st.binary(min_size=1, max_size=12))
def test_overwritten_bytes_give_samples_or_an_error(tmp_path, position, junk):
    path = write_tar(tmp_path / "a.tar", sample_members(0))
    content = bytearray(path.read_bytes())
    content[position : position + len(junk)] = junk
    path.write_bytes(content)
    try:
        for sample in index_tar(path):
            assert all(offset >= 0 and offset + size <= len(content) for offset, size in sample.spans.values())
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_not_left_out(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("b.txt")
        info.type, info.linkname = kind, "a.txt"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"a\.tar: its member 'b\.txt' is not a plain file"):
        index_tar(path)


def test_a_member_that_claims_more_than_a_sample_is_refused(tmp_path):
    info = tarfile.TarInfo("a.txt")
    info.size = 1 << 40
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(info.size + (1 << 20))  # there, as a hole
    with pytest.raises(UserError, match="1099511627776 bytes; a member may have up to"):
        index_tar(tmp_path / "a.tar")


NAMES = st.lists(st.text("ab0/é", min_size=1, max_size=8), min_size=1, max_size=6, unique=True)


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(NAMES, st.data())
def test_what_is_written_is_read_back(tmp_path, keys, data):
    """Samples of any keys, sizes and values, over any number of shards, by offset and front to back."""
    keys = [f"k{number}/{key.strip('/')}x" for number, key in enumerate(keys)]
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
    written = {}
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with ShardWriter(str(folder / "s-%03d.tar"), data.draw(st.integers(1, 4))) as writer:
        for key in keys:
            values = data.draw(hnp.arrays(np.float16, shape, elements=st.floats(-8, 8, width=16)))
            caption = data.draw(st.text(st.characters(codec="utf-8"), max_size=20))
            written[key] = (values.tobytes(), caption)
            writer.write(key, {"f8.npy": npy.encode(values), "t5.npy": npy.encode(values[0]), "txt": caption.encode()})
    dataset = ShardDataset(sorted(folder.glob("*.tar")))
    stream = ShardStream([f"file:{path}" for path in dataset.paths])
    for samples in ((dataset[number] for number in range(len(dataset))), stream):
        assert {sample["__key__"]: (sample["f8"].tobytes(), sample["txt"]) for sample in samples} == written
