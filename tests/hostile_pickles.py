"""Pickles that run code when Python reads them, or that try to. Each would leave a file at ``canary``."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

from tests.pickle_parts import CHECKPOINT, call, index, listing, mapping, name, number, sequence, tensor, text, whole


def calls(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Every way in that scanners have missed so far: a function that runs code, with its arguments."""
    shell, code = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w')")
    arguments = {
        ("os", "system"): [shell],
        ("posix", "system"): [shell],
        ("os", "popen"): [shell],
        ("subprocess", "getoutput"): [shell],
        ("subprocess", "call"): [sequence(text("touch"), text(str(canary)))],
        ("subprocess", "Popen"): [sequence(text("touch"), text(str(canary)))],
        ("builtins", "eval"): [code],
        ("builtins", "exec"): [code],
        ("builtins", "open"): [text(str(canary)), text("w")],
        ("builtins", "__import__"): [text("this")],
        ("builtins", "compile"): [code, text("x"), text("exec")],
        ("builtins", "map"): [name("os", "system"), listing(shell)],
        ("__builtin__", "eval"): [code],
        ("io", "open"): [text(str(canary)), text("w")],
        ("_io", "open"): [text(str(canary)), text("w")],
        ("pathlib", "Path"): [text(str(canary))],
        ("importlib", "import_module"): [text("this")],
        ("runpy", "run_path"): [text(str(canary))],
        ("timeit", "timeit"): [code],
        ("cProfile", "run"): [code],
        ("profile", "run"): [code],
        ("pdb", "run"): [code],
        ("doctest", "debug_script"): [code],
        ("bdb", "Bdb"): [],
        ("trace", "Trace"): [],
        ("code", "InteractiveInterpreter"): [],
        ("pydoc", "pipepager"): [text("x"), shell],
        ("pydoc", "locate"): [text("this")],
        ("pkgutil", "resolve_name"): [text("os:system")],
        ("operator", "attrgetter"): [text("system")],
        ("functools", "partial"): [name("os", "system"), shell],
        ("types", "FunctionType"): [],
        ("ctypes", "CDLL"): [text("libc.so.6")],
        ("multiprocessing.util", "spawnv_passfds"): [],
        ("logging.config", "fileConfig"): [text(str(canary))],
        ("idlelib.run", "Executive"): [],
        ("copyreg", "_reconstructor"): [],
        ("copyreg", "add_extension"): [text("os"), text("system"), number(7)],
        ("pickle", "loads"): [],
        ("_pickle", "loads"): [],
        ("torch", "load"): [text(str(canary))],
        ("torch.serialization", "load"): [text(str(canary))],
        ("torch.hub", "load"): [],
        ("torch.jit", "load"): [text(str(canary))],
        ("torch._utils", "_rebuild_tensor_v2"): [],
        ("torch.utils.collect_env", "run"): [shell],
        ("torch.utils._config_module", "load_config"): [],
        ("torch._inductor.codecache", "compile_file"): [],
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"): [text("/")],
        ("numpy.testing._private.utils", "runstring"): [code, mapping({})],
        ("torch", "float32.__class__"): [],
        ("torch", "serialization.os.system"): [shell],
        ("torch.serialization", "os.system"): [shell],
        ("torch.serialization", "_get_layout.__globals__"): [],
        ("pathlib", "PosixPath.unlink"): [text(str(canary))],
        ("pathlib", "os.system"): [shell],
        ("pathlib", "PosixPath\n"): [text(str(canary))],
        ("Torch", "Size"): [],
        ("torch.", "Size"): [],
        ("", "torch.Size"): [],
        (CHECKPOINT, "os.system"): [shell],
        (CHECKPOINT, "Metadata.__init__.__globals__"): [],
        (CHECKPOINT, "__builtins__"): [],
    }
    for (module, attribute), args in arguments.items():
        yield f"{module!r} {attribute!r}", whole(call(name(module, attribute), *args))


def instructions(canary: Path) -> Iterator[tuple[str, bytes]]:
    """The same by other instructions, and hidden in an index that is honest otherwise."""
    shell = text(f"touch {canary}")
    system = name("os", "system")
    attack = call(system, shell)
    yield "GLOBAL", whole(b"cos\nsystem\n" + sequence(shell) + pickle.REDUCE)
    yield "GLOBAL of a dotted name", whole(b"ctorch\nserialization.os.system\n" + sequence(shell) + pickle.REDUCE)
    yield "INST", whole(pickle.MARK + shell + b"ios\nsystem\n")
    yield "OBJ", whole(pickle.MARK + system + shell + pickle.OBJ)
    yield "OBJ of what is known", whole(pickle.MARK + name("torch", "Size") + pickle.OBJ)
    yield "NEWOBJ", whole(name("subprocess", "Popen") + sequence(shell) + pickle.NEWOBJ)
    yield "NEWOBJ_EX", whole(name("torch", "Size") + sequence() + mapping({}) + pickle.NEWOBJ_EX)
    yield "EXT1", whole(pickle.EXT1 + b"\x07" + sequence(shell) + pickle.REDUCE)
    yield "EXT2", whole(pickle.EXT2 + b"\x07\x00" + sequence(shell) + pickle.REDUCE)
    yield "EXT4", whole(pickle.EXT4 + b"\x07\x00\x00\x00" + sequence(shell) + pickle.REDUCE)
    yield "PERSID", whole(b"Pos.system\n")
    yield "BINPERSID", whole(shell + pickle.BINPERSID)
    yield "NEXT_BUFFER", whole(pickle.NEXT_BUFFER, 5)
    yield "READONLY_BUFFER", whole(text("x") + pickle.READONLY_BUFFER, 5)
    yield (
        "a name put together from the memo",
        whole(
            text("os")
            + b"q\x00"
            + text("system")
            + b"q\x01"
            + b"h\x00h\x01"
            + pickle.STACK_GLOBAL
            + sequence(shell)
            + b"R"
        ),
    )
    yield (
        "a memo entry that changes its value",
        whole(text("torch") + b"q\x00" + text("os") + b"q\x00" + b"h\x00" + text("system") + pickle.STACK_GLOBAL),
    )
    yield "in the version", whole(index({"version": attack}))
    yield "in planner_data", whole(index({"planner_data": mapping({text("w"): sequence(attack)})}))
    yield "as a key", whole(index({"storage_data": mapping({attack: pickle.NONE})}))
    yield "in a field of the future", whole(index({"flavour": attack}))
    yield "in a size", whole(index({"state_dict_metadata": mapping({text("w"): tensor({"size": attack})})}))
    yield "as a dtype", whole(index({"state_dict_metadata": mapping({text("w"): tensor({"properties": system})})}))
    yield "behind an honest index", whole(index() + attack + pickle.TUPLE2)
    yield "inside a pickle inside", whole(call(name("pickle", "loads"), text(repr(whole(attack)))))
