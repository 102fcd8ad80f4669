"""What a newer release calls and older extensions lack, on packages made up for it."""

from tools.vllm_release.gaps import calls, misfits, missing

OLD = {
    "_custom_ops.py": """
def rms_norm(x):
    torch.ops._C.rms_norm(x, 1e-6)

def scaled_fp8(x):
    torch.ops._C.scaled_fp8(x)

def cpu_attention(x):
    torch.ops._C.cpu_attention(x, out=x)
""",
}
HAS = {"_C::rms_norm": (1, 2), "_C::cpu_attention": (2, 3)}


def found(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return list(calls(folder))


def told(wanted, tmp_path, files):
    old = found(tmp_path / "old", OLD)
    new = found(tmp_path / "new", files)
    return [call.operator for call in wanted(new, old, HAS)]


def test_a_release_that_calls_the_same_lacks_nothing(tmp_path):
    assert told(missing, tmp_path, OLD) == []
    assert told(misfits, tmp_path, OLD) == []


def test_a_call_is_found_with_its_place_and_arguments(tmp_path):
    (call, *_), last = (every := found(tmp_path, OLD)), every[-1]
    assert (call.operator, call.file, call.function, call.line, call.arguments) == (
        "_C::rms_norm", "_custom_ops.py", "rms_norm", 3, 2,
    )  # fmt: skip
    assert last.arguments == 2


def test_an_operator_that_only_other_devices_call_is_not_missed(tmp_path):
    new = {
        "models/octave.py": "def f(x):\n    return torch.ops._C.octave(x)\n",
        "_custom_ops.py": "def scaled_fp8(x):\n    torch.ops._C.scaled_fp8(x)\n",
    }
    assert told(missing, tmp_path, new) == []


def test_an_operator_of_the_cpus_is_missed_by_its_file_its_function_or_its_name(tmp_path):
    new = {
        "v1/worker/cpu_worker.py": "torch.ops._C_utils.bind_threads('0')\n",
        "_custom_ops.py": "def cpu_gemm(x):\n    torch.ops._C.gemm(x)\n",
        "layers/moe.py": "class Moe:\n    def f(self):\n        return torch.ops._C.moe_cpu\n",
    }
    expected = ["_C::gemm", "_C::moe_cpu", "_C_utils::bind_threads"]
    assert sorted(told(missing, tmp_path, new)) == expected


def test_an_operator_that_has_another_name_now_is_missed(tmp_path):
    new = {"_custom_ops.py": "def rms_norm(x):\n    torch.ops._C.rms_norm_out(x, 1e-6)\n"}
    assert told(missing, tmp_path, new) == ["_C::rms_norm_out"]


def test_another_number_of_arguments_is_told(tmp_path):
    new = {"_custom_ops.py": "def rms_norm(x):\n    torch.ops._C.rms_norm(x, 1e-6, True)\n"}
    assert told(misfits, tmp_path, new) == ["_C::rms_norm"]
    # What is not known before it runs is not told.
    new = {"_custom_ops.py": "def rms_norm(x):\n    torch.ops._C.rms_norm(*x)\n"}
    assert told(misfits, tmp_path, new) == []
