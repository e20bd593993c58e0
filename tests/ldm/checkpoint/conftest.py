"""Writers of checkpoint files that torch.save would not write."""

import io
import pickle
import zipfile

import pytest
import torch


@pytest.fixture
def write_zip(tmp_path):
    """Write records into a zip file that looks like torch.save's; a record that is not bytes is pickled."""

    def write(name="bad.ckpt", compression=zipfile.ZIP_STORED, **records):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", compression) as archive:
            for record, content in {"version": b"3\n", **records}.items():
                data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
                archive.writestr(f"archive/{record.replace('data_pkl', 'data.pkl')}", data)
        return path

    return write


@pytest.fixture
def write_legacy(tmp_path):
    """Write a file of PyTorch before 1.6 whose object is the pickle `data`."""

    def write(data):
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        buffer.seek(0)
        for _ in range(3):  # magic number, protocol, sizes
            pickle.load(buffer)
        path = tmp_path / "legacy.ckpt"
        path.write_bytes(buffer.getvalue()[: buffer.tell()] + data + pickle.dumps([], protocol=2))
        return path

    return write
