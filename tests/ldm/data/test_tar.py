import gzip
import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_files import sample_members, write_tar

from ldm.data.tar import index_tar, split_name
from ldm.util import UserError


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
