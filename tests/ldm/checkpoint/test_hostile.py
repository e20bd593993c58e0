"""Nothing that a checkpoint names is ever run."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from ldm.util import UserError


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


class New:
    """Pickles as the creation of an object, by NEWOBJ."""

    def __reduce_ex__(self, protocol):
        return object.__reduce_ex__(self, 2)


class SetState:
    """Runs a command when its state is set."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


def opcodes(command):
    """Hand-written pickles that run `command`, by every opcode that calls something."""
    text = command.encode()
    short = b"\x8c" + bytes([len(text)]) + text
    return {
        "GLOBAL, REDUCE": b"cos\nsystem\n(V" + text + b"\ntR.",
        "INST": b"(V" + text + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + text + b"\no.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(V" + text + b"\n(lK\x01t\x81.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85R.",
        "dotted STACK_GLOBAL": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + short + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85}\x92.",
        "BUILD on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}V__code__\ncos\nsystem\nsb.",
        "EXT1": b"\x80\x02\x82\x01.",
    }


def payloads(command):
    """Objects whose unpickling would run `command`."""
    system = Call(os.system, command)
    python = f"import os; os.system({command!r})"
    return {
        "os.system": system,
        "subprocess": Call(subprocess.Popen, command, -1, None, None, None, None, None, True, True),
        "eval": Call(eval, f"__import__('os').system({command!r})"),
        "exec": Call(exec, python),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "getattr, then called": Call(map, Call(getattr, Call(__import__, "os"), "system"), [command]),
        "setattr": Call(setattr, torch.Size, "numel", eval),
        "torch.hub.load": Call(torch.hub.load, command, "model"),
        "torch.load": Call(torch.load, command),
        "torch._C": Call(
            torch._C._load_for_lite_interpreter if hasattr(torch._C, "_load_for_lite_interpreter") else id, 1
        ),
        "torch.utils": Call(torch.utils.cpp_extension.load_inline, "x", command)
        if hasattr(torch.utils, "cpp_extension")
        else Call(torch.jit.load, command),
        "copyreg": Call(__import__("copyreg")._reconstructor, subprocess.Popen, object, None),
        "__setstate__": SetState(command),
        "NEWOBJ": New(),
        "state of an OrderedDict": Call(OrderedDict, state={"__class__": Call(eval, python)}),
        "a rebuild function's argument": Call(torch._utils._rebuild_parameter, system, False, OrderedDict()),
        "hooks of a tensor": Call(torch._utils._rebuild_tensor_v2, torch.ones(2), 0, (2,), (1,), True, system),
        "_rebuild_from_type_v2": Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (command,), None),
        "default factory": Call(__import__("collections").defaultdict, eval),
        "_codecs": Call(__import__("_codecs").decode, command.encode(), "rot13"),
        "builtins": Call(builtins.compile, python, "x", "exec"),
    }


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"


def names(of):
    return sorted(of("x"))


@pytest.mark.parametrize("name", names(opcodes))
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_no_opcode_runs_anything(name, container, marker, write_zip, write_legacy):
    data = opcodes(f"touch {marker}")[name]
    path = write_zip(data_pkl=data) if container == "zip" else write_legacy(data)
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", names(payloads))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "value", "state_dict", "key", "callbacks"])
def test_no_object_runs_anything(name, zipped, place, marker, tmp_path):
    evil = payloads(f"touch {marker}")[name]
    weights = {"w": torch.arange(3.0)}
    content = {
        "top": evil,
        "value": {"state_dict": weights, "x": evil},
        "state_dict": {"state_dict": {**weights, "x": evil}},
        "key": {"state_dict": weights, evil: 1},
        "callbacks": {"state_dict": weights, "callbacks": [{"deep": (1, [evil])}]},
    }[place]
    path = tmp_path / "evil.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert place == "top" or torch.equal(loaded["state_dict"]["w"], weights["w"])
    assert not marker.exists()


def test_what_is_left_out_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {SetState: {"best": 1}, "kept": 2}}, path)
    assert load_checkpoint(path)["callbacks"] == {"kept": 2}
    assert f"{SetState.__module__}.SetState" in caplog.text


def test_a_pickled_module_is_refused_by_name(tmp_path):
    path = tmp_path / "module.ckpt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        load_checkpoint(path)


def test_a_storage_smaller_than_its_tensor_is_refused(write_zip):
    """Else a tensor would show memory that lies behind its own."""
    for size, stride in [((1000,), (1,)), ((2,), (1 << 40,)), ((1 << 62, 4), (4, 1)), ((2,), (-1,))]:
        path = write_zip(data_pkl=_tensor_pickle(numel=2, offset=0, size=size, stride=stride), **{"data/0": b"\0" * 8})
        with pytest.raises(UserError):
            load_checkpoint(path)
    for numel, offset in [(1000, 0), (-1, 0), (2, 5), (2, -1), (1 << 62, 0)]:
        data = _tensor_pickle(numel=numel, offset=offset, size=(2,), stride=(1,))
        with pytest.raises(UserError):
            load_checkpoint(write_zip(data_pkl=data, **{"data/0": b"\0" * 8}))


def _tensor_pickle(numel, offset, size, stride):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value == "here" else None

    buffer = io.BytesIO()
    tensor = Call(torch._utils._rebuild_tensor_v2, "here", offset, size, stride, False, OrderedDict())
    Pickler(buffer, protocol=2).dump({"w": tensor})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "saved_id", ["'text'", 5, ("module", os.system, "a", "b"), ("storage", os.system, "0", "cpu", 2), ("storage",)]
)
def test_strange_persistent_ids_are_refused(saved_id, write_zip):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return saved_id if value == "here" else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": "here"})
    with pytest.raises(UserError):
        load_checkpoint(write_zip(data_pkl=buffer.getvalue(), **{"data/0": b"\0" * 8}))


def test_memory_bombs_are_refused(write_zip):
    huge = struct.pack("<Q", 1 << 60)
    bombs = [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # LONG_BINPUT at 2³¹ would make pickle allocate 64 GB
        b"\x80\x04\x8e" + huge + b"x.",  # BINBYTES8 of 1 EB
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ]
    for bomb in bombs:
        with pytest.raises(UserError):
            load_checkpoint(write_zip(data_pkl=bomb))


def test_a_pickle_that_holds_itself_loads(tmp_path):
    content = {"state_dict": {"w": torch.ones(1)}, "list": [1]}
    content["list"].append(content["list"])
    content["self"] = content
    path = tmp_path / "cycle.ckpt"
    torch.save(content, path)
    assert load_checkpoint(path)["self"]["list"][1][1][0] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="TorchScript"):
        load_checkpoint(path)


def test_a_compressed_archive_is_refused_and_not_read_as_weights(tmp_path):
    """Its bytes lie at the offsets of the weights, so mapping them would give noise."""
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as old,
        zipfile.ZipFile(tmp_path / "deflated.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(UserError, match="compressed"):
        load_state_dict(tmp_path / "deflated.ckpt")


def test_a_record_marked_as_a_folder_is_refused(tmp_path):
    """torch reads nothing of it, and gives whatever lies in memory."""
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.arange(1000.0)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.getinfo("model/data/0").external_attr = 0x10
        archive._didModify = True
    with pytest.raises(UserError, match="data/0 is marked as a folder"):
        load_state_dict(path)


@pytest.mark.parametrize("metadata", [3, {"conj": False}, {"neg": None}, {"other": True}, {1: True}, {"conj": [True]}])
def test_a_view_that_torch_does_not_write_is_refused(metadata, tmp_path):
    view = Call(torch._utils._rebuild_tensor_v2, torch.ones(2).untyped_storage(), 0, (2,), (1,), False, {}, metadata)
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(2), "x": view}, path)
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(path)


# (((), ()), ((), ())) and so on, 2⁸⁰ parts in 160 bytes: to hash, print or compare it takes for ever.
ENDLESS = b")" + b"2\x86" * 80


@pytest.mark.parametrize(
    "data",
    {
        "dict key": b"}" + ENDLESS + b"Ns.",
        "set element": b"\x8f(" + ENDLESS + b"\x90.",
        "frozenset element": b"(" + ENDLESS + b"\x91.",
        "set's argument": b"cbuiltins\nset\n((" + ENDLESS + b"ltR.",
        "OrderedDict's key": b"ccollections\nOrderedDict\n(((" + ENDLESS + b"NtltR.",
        "name of a global": ENDLESS + b"\x8c\x01x\x93.",
        "persistent id": ENDLESS + b"Q.",
        "kind of a storage": b"(\x8c\x07storage" + ENDLESS + b"\x8c\x010\x8c\x03cpuK\x02tQ.",
        "key of a storage": b"(\x8c\x07storagectorch\nFloatStorage\n" + ENDLESS + b"\x8c\x03cpuK\x02tQ.",
        "numel of a storage": b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + ENDLESS + b"tQ.",
        "size of a tensor": b"ctorch._utils\n_rebuild_tensor\n(NK\x00" + ENDLESS + ENDLESS + b"tR.",
        "metadata of a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89N" + ENDLESS + b"tR.",
        "encoding": b"c_codecs\nencode\n(V\n" + ENDLESS + b"tR.",
        "whole content": ENDLESS + b".",
    }.items(),
    ids=lambda item: item[0],
)
def test_endless_values_are_refused_at_once(data, write_zip):
    with pytest.raises(UserError):
        load_checkpoint(write_zip(data_pkl=b"\x80\x04" + data[1]))


def test_an_endless_value_is_carried_along_unread(write_zip):
    path = write_zip(data_pkl=b"\x80\x04}(V" + b"x\n" + ENDLESS + b"u.")
    assert load_checkpoint(path).keys() == {"x"}
    with pytest.raises(UserError, match="has no weights"):
        load_state_dict(path)


def test_names_from_a_file_cannot_break_the_lines_of_messages(tmp_path, caplog, write_zip):
    caplog.set_level("INFO")
    load_checkpoint(write_zip(data_pkl=b"\x80\x04}(\x8c\x01x\x8c\x04a\n\x1b[\x8c\x01b\x93\x8c\x01yNu."))
    assert r"a\n\x1b[.b" in caplog.text
    torch.save({"model.\nerror: all is well": torch.ones(1)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="not the name of a weight") as caught:
        load_state_dict(tmp_path / "model.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [torch.save, save_checkpoint])
def test_a_bit_that_changed_in_a_weight_is_told_of(tmp_path, save):
    path = tmp_path / "model.ckpt"
    save({"w": torch.full((1000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((8,), 1.5).numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="data/0 does not match its checksum"):
        load_checkpoint(path)


def test_a_few_bytes_cannot_stand_for_a_terabyte(write_zip):
    data = _tensor_pickle(numel=2, offset=0, size=(1 << 40,), stride=(0,))
    with pytest.raises(UserError, match="in a storage of 2"):
        load_checkpoint(write_zip(data_pkl=data, **{"data/0": b"\0" * 8}))


def test_an_expanded_tensor_is_read(tmp_path):
    torch.save({"w": torch.ones(1).expand(100)}, tmp_path / "model.ckpt")
    assert load_checkpoint(tmp_path / "model.ckpt")["w"].sum() == 100


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="a named pipe"):
        load_checkpoint(tmp_path / "model.ckpt")
