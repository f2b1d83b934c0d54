"""Section Capability: recorded machines, the heuristic, estimates, scores and their cache."""

import ctypes
import json
import os
import sys
import threading
import types

import pytest

import dvai_bridge
from dvai_bridge import (
    CpuClass,
    GgmlType,
    GpuClass,
    HardwareHints,
    HardwareMode,
    HardwareView,
    MachineSpeed,
    ModelCost,
    Score,
    ScoreCache,
    ScoreKey,
    ScoreSource,
    Usage,
    assess_hardware,
    average_score,
    build_score_json,
    build_scores_json,
    choose_score,
    classify_gpu_name,
    compute_heuristic_tok_per_s,
    compute_model_cost,
    encode_score_table,
    estimate_builtin_tok_per_s,
    estimate_tok_per_s,
    open_gguf,
    parse_score_json,
    parse_score_table,
    parse_scores_json,
    probe_hardware_hints,
    probe_machine_speed,
    probe_total_memory,
    run_tool,
)
from tests.test_registry import GIB, LLAMA, build_model, build_root

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX links, FIFOs and limits")


# ---- hints: machines as they describe themselves --------------------------------------


def pci(slot, driver, pci_class, pci_id, **files):
    """The files of a PCI device, as /sys/bus/pci/devices shows it."""
    uevent = f"DRIVER={driver}\n" if driver else ""
    uevent += f"PCI_CLASS={pci_class}\nPCI_ID={pci_id}\nPCI_SUBSYS_ID=17AA:22D5\nPCI_SLOT_NAME={slot}\n"
    directory = f"sys/bus/pci/devices/{slot}"
    return {f"{directory}/uevent": uevent} | {f"{directory}/{name}": text for name, text in files.items()}


def memory(kilobytes):
    return {"proc/meminfo": f"MemTotal:       {kilobytes} kB\nMemFree:          224544 kB\n"}


RENDER_NODE = {"dev/dri/renderD128": ""}
NETWORK_CARD = pci("0000:00:1f.6", "e1000e", "20000", "8086:15FB")
INTEL_GPU = pci("0000:00:02.0", "i915", "30000", "8086:9A49")
RTX_4070 = pci("0000:01:00.0", "nvidia", "30000", "10DE:2786")
DEBIAN = {"proc/self/cgroup": "0::/user.slice/user-1000.slice/session-1.scope\n"}

# name: (files, cores, output of nvidia-smi -L, hints)
LINUX_MACHINES = {
    "Raspberry Pi 4, 4 GB": (
        memory(3884360)
        | RENDER_NODE  # of its VideoCore, on which no engine computes
        | {"proc/device-tree/compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0"}
        | {"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"},
        4,
        "",
        (False, 4, "none", "low"),
    ),
    "Raspberry Pi 5, 8 GB, with a Hailo": (
        memory(8256240)
        | {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"}
        | pci("0001:01:00.0", "hailo", "b4000", "1E60:2864")
        | {"sys/class/hailo_chardev/hailo0": ""},
        4,
        "",
        (True, 8, "none", "low"),
    ),
    "Raspberry Pi Zero 2 W": (memory(439812), 4, "", (False, 0.4, "none", "low")),
    "Jetson Orin Nano": (
        memory(7802036) | {"proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0"},
        6,
        "GPU 0: Orin (nvgpu) (UUID: 054fb0a5-1a1c-5a2b-9f4f-3d8a6f0c1b2d)\n",
        (False, 7, "integrated", "mid"),
    ),
    "Rock 5B": (
        memory(16146304)
        | {"proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0"}
        | {"sys/bus/platform/drivers/RKNPU/bind": "", "sys/bus/platform/drivers/RKNPU/fdab0000.npu": ""},
        8,
        "",
        (True, 15, "none", "mid"),
    ),
    "laptop with Intel's graphics and NPU": (
        memory(32509164) | RENDER_NODE | NETWORK_CARD | INTEL_GPU | {"sys/class/accel/accel0": ""} | DEBIAN,
        22,
        "",
        (True, 31, "integrated", "high"),
    ),
    "laptop with AMD's graphics": (
        memory(15728640)
        | RENDER_NODE
        | pci("0000:c4:00.0", "amdgpu", "38000", "1002:15BF", mem_info_vram_vendor="unknown"),
        16,
        "",
        (False, 15, "integrated", "high"),
    ),
    "PC with a Radeon RX 7800 XT": (
        memory(32768000)
        | RENDER_NODE
        | pci("0000:03:00.0", "amdgpu", "30000", "1002:747E", mem_info_vram_vendor="hynix"),
        16,
        "",
        (False, 31, "discrete", "high"),
    ),
    "PC with an RTX 4070 beside Intel's graphics": (
        memory(65704252) | RENDER_NODE | {"dev/nvidiactl": ""} | INTEL_GPU | RTX_4070,
        8,
        "",
        (False, 63, "discrete", "mid"),
    ),
    "PC with an Arc A770": (
        memory(32768000) | RENDER_NODE | pci("0000:03:00.0", "i915", "30000", "8086:56A0"),
        12,
        "",
        (False, 31, "discrete", "high"),
    ),
    "PC whose card is given to a virtual machine": (
        memory(32768000) | RENDER_NODE | INTEL_GPU | pci("0000:01:00.0", "vfio-pci", "30000", "10DE:2786"),
        12,
        "",
        (False, 31, "integrated", "high"),
    ),
    "server whose NVIDIA driver was not used since it started": (
        memory(263856132) | pci("0000:41:00.0", "nvidia", "30200", "10DE:2330"),
        64,
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b6f4e3a-0000-0000-0000-000000000000)\n",
        (False, 252, "discrete", "high"),
    ),
    "server with its management controller's display": (
        memory(131900000) | {"dev/dri/renderD128": ""} | pci("0000:03:00.0", "ast", "30000", "1A03:2000"),
        32,
        "",
        (False, 126, "none", "high"),
    ),
    "WSL with an NVIDIA card": (
        memory(16309312) | {"dev/dxg": ""} | pci("4e5a:00:00.0", "dxgkrnl", "30200", "1414:008E"),
        16,
        "GPU 0: NVIDIA GeForce RTX 3080 (UUID: GPU-2c6f4e3a-0000-0000-0000-000000000000)\n",
        (False, 16, "discrete", "high"),
    ),
    "container without the host's GPU, 2 of 16 cores, 3 of 64 GB": (
        memory(65704252)
        | RTX_4070
        | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{3 * GIB}\n"}
        | {"sys/fs/cgroup/cpu.max": "200000 100000\n"},
        16,
        "",
        (False, 3, "none", "low"),
    ),
    "container of the first cgroups, 12 of 64 cores": (
        memory(65704252)
        | {"proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n9:memory:/docker/1\n"}
        | {"sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "1200000\n"}
        | {"sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n"}
        | {"sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{8 * GIB}\n"},
        64,
        "",
        (False, 8, "none", "high"),
    ),
    "service without a quota": (
        memory(8126464) | {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"},
        6,
        "",
        (False, 8, "none", "mid"),
    ),
    "board that says nothing": ({"proc/meminfo": ""}, 1, "", (False, 4, "none", "low")),
}


def as_tuple(hints):
    return hints.has_npu, hints.ram_gb, hints.gpu_class.value, hints.cpu_class.value


@pytest.mark.parametrize("name", LINUX_MACHINES)
def test_hints_of_linux(tmp_path, name):
    files, cores, nvidia_smi, expected = LINUX_MACHINES[name]
    view = HardwareView(
        platform="linux",
        root=build_root(tmp_path, files),
        run=lambda command: nvidia_smi if list(command) == ["nvidia-smi", "-L"] else "",
        count_cores=lambda: cores,
    )
    assert as_tuple(probe_hardware_hints(view)) == expected


INTEL_MAC_DISPLAYS = """Graphics/Displays:

    Intel UHD Graphics 630:

      Chipset Model: Intel UHD Graphics 630
      Type: GPU
      Bus: Built-In

    AMD Radeon Pro 5300M:

      Chipset Model: AMD Radeon Pro 5300M
      Type: GPU
      Bus: PCIe
"""
M1 = {
    "sysctl hw.memsize hw.ncpu": "hw.memsize: 17179869184\nhw.ncpu: 8\n",
    "sysctl hw.optional.arm64": "hw.optional.arm64: 1\n",
}
INTEL_MAC = {
    "sysctl hw.memsize hw.ncpu": "hw.memsize: 34359738368\nhw.ncpu: 12\n",
    "system_profiler SPDisplaysDataType": INTEL_MAC_DISPLAYS,
}


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (M1, (True, 16, "apple-silicon", "mid")),
        (INTEL_MAC, (False, 32, "discrete", "high")),
        (
            INTEL_MAC | {"system_profiler SPDisplaysDataType": INTEL_MAC_DISPLAYS[:150]},
            (False, 32, "integrated", "high"),
        ),
        ({}, (False, 4, "none", "low")),  # no tool answers
    ],
)
def test_hints_of_macos(outputs, expected):
    view = HardwareView(platform="darwin", run=lambda words: outputs.get(" ".join(words), ""), count_cores=lambda: 4)
    assert as_tuple(probe_hardware_hints(view)) == expected


DISPLAY_CLASS = "{4d36e968-e325-11ce-bfc1-08002be10318}"
NPU_CLASS = "{f01a9d53-3ff6-48d2-9f97-c8a7004be10c}"


class FakeRegistry:
    """winreg's functions over {class: [{name: value}]}; a subkey that is None may not be opened."""

    HKEY_LOCAL_MACHINE = object()

    def __init__(self, classes):
        self._classes = classes

    class Key:
        def __init__(self, value):
            self.value = value

        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            pass

    def OpenKey(self, parent, name):
        if parent is self.HKEY_LOCAL_MACHINE:
            prefix, _, class_id = name.rpartition("\\")
            assert prefix == r"SYSTEM\CurrentControlSet\Control\Class"
            if class_id not in self._classes:
                raise FileNotFoundError(2, "no such key")
            return self.Key(self._classes[class_id])
        subkey = parent.value[int(name)]
        if subkey is None:
            raise PermissionError(13, "denied")
        return self.Key(subkey)

    def QueryInfoKey(self, key):
        return len(key.value), 0, 0

    def EnumKey(self, key, index):
        return f"{index:04d}"

    def QueryValueEx(self, key, name):
        if name not in key.value:
            raise FileNotFoundError(2, "no such value")
        return key.value[name], 1


def describe(*names):
    return [{"DriverDesc": name, "ProviderName": "x"} for name in names]


@pytest.mark.parametrize(
    ("classes", "cores", "expected"),
    [
        (
            {DISPLAY_CLASS: [*describe("Intel(R) UHD Graphics 770", "NVIDIA GeForce RTX 4060"), {}, None]},
            20,
            (False, 16, "discrete", "high"),
        ),
        (
            {DISPLAY_CLASS: describe("Intel(R) Arc(TM) 140V GPU (16GB)"), NPU_CLASS: describe("Intel(R) AI Boost")},
            8,
            (True, 16, "integrated", "mid"),
        ),
        ({DISPLAY_CLASS: describe("Microsoft Basic Display Adapter")}, 4, (False, 16, "none", "low")),
        ({}, 4, (False, 16, "none", "low")),
    ],
)
def test_hints_of_windows(monkeypatch, classes, cores, expected):
    def fill(pointer):
        counts = [16 * GIB - 5 * 1024**2, 4 * GIB, 20 * GIB, 3 * GIB, 1 << 47, 1 << 46, 0]
        octets = b"".join(count.to_bytes(8, sys.byteorder) for count in counts)
        ctypes.memmove(ctypes.cast(pointer, ctypes.c_void_p).value + 8, octets, 56)
        return 1

    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setitem(sys.modules, "winreg", FakeRegistry(classes))
    view = HardwareView(platform="win32", count_cores=lambda: cores)
    assert as_tuple(probe_hardware_hints(view)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce GTX 1650", "discrete"),
        ("AMD Radeon(TM) Graphics", "integrated"),
        ("AMD Radeon(TM) RX Vega 11 Graphics", "integrated"),
        ("AMD Radeon 780M Graphics", "integrated"),
        ("AMD Radeon RX 7900 XTX", "discrete"),
        ("AMD Radeon Pro 5500M ", "discrete"),
        ("Intel(R) Iris(R) Xe Graphics", "integrated"),
        ("Intel(R) Arc(TM) Graphics", "integrated"),
        ("Intel(R) Arc(TM) A770 Graphics", "discrete"),
        ("Intel(R) Arc(TM) B580 Graphics", "discrete"),
        ("Qualcomm(R) Adreno(TM) X1-85 GPU", "integrated"),
        ("Microsoft Remote Display Adapter", "none"),
        ("VMware SVGA 3D", "none"),
        ("", "none"),
    ],
)
def test_names_of_gpus(name, expected):
    assert classify_gpu_name(name).value == expected


def test_this_machine_has_hints():
    hints = probe_hardware_hints()
    total = probe_total_memory()
    assert hints.ram_gb > 0 and (total is None or 1 << 20 < total < 1 << 50)
    assert json.loads(json.dumps(hints.build_json())).keys() == {"hasNpu", "ramGb", "gpuClass", "cpuClass"}


def test_the_registry_is_empty_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "winreg", None)
    assert dvai_bridge.read_registry("x", "y") == []


@posix_only
def test_a_tool_that_fails_hangs_or_is_absent_says_nothing(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "TOOL_TIMEOUT_S", 60)
    assert run_tool([sys.executable, "-c", "print('here')"]) == "here\n"
    assert run_tool([sys.executable, "-c", "print('half'); raise SystemExit(3)"]) == ""
    assert run_tool(["/nowhere/nvidia-smi"]) == ""
    monkeypatch.setattr(dvai_bridge, "TOOL_TIMEOUT_S", 0.05)
    assert run_tool([sys.executable, "-c", "import time; time.sleep(600)"]) == ""


# ---- the heuristic --------------------------------------------------------------------


def hints_of(gpu="none", cpu="mid", ram_gb=16, has_npu=False):
    return HardwareHints(has_npu=has_npu, ram_gb=ram_gb, gpu_class=GpuClass(gpu), cpu_class=CpuClass(cpu))


@pytest.mark.parametrize(
    ("hints", "tok_per_s"),
    [
        (hints_of(), 3.0),
        (hints_of("integrated"), 8.0),
        (hints_of("discrete"), 35.0),
        (hints_of("apple-silicon"), 40.0),
        (hints_of("none", "low"), 1.8),
        (hints_of("none", "high"), 3.9),
        (hints_of("integrated", ram_gb=7), 5.6),
        (hints_of("integrated", ram_gb=8), 8.0),
        (hints_of("integrated", ram_gb=4), 5.6),
        (hints_of("integrated", ram_gb=3.9), 2.4),
        (hints_of("apple-silicon", "mid", has_npu=True), 56.0),
        (hints_of("discrete", "high"), 45.5),
        (hints_of("none", "low", ram_gb=2, has_npu=True), 0.8),
        (hints_of("discrete", "mid", ram_gb=4), 24.5),
    ],
)
def test_the_heuristic(hints, tok_per_s):
    assert compute_heuristic_tok_per_s(hints) == tok_per_s


def test_the_assessment_has_the_shape_of_every_platform():
    assert assess_hardware(hints=hints_of("integrated", ram_gb=8)).build_json() == {
        "mode": "offload-only",
        "tokPerSec": 8.0,
        "reason": "estimated 8 tok/s, below the 10 tok/s comfort threshold — model will not be loaded locally; "
        "every request will be forwarded to a paired peer.",
        "hints": {"hasNpu": False, "ramGb": 8, "gpuClass": "integrated", "cpuClass": "mid"},
    }


@pytest.mark.parametrize(
    ("hints", "thresholds", "mode"),
    [
        (hints_of("discrete"), (), HardwareMode.OK),
        (hints_of("none"), (), HardwareMode.OFFLOAD_ONLY),  # 3.0: not below the floor
        (hints_of("none", "low"), (), HardwareMode.TOO_WEAK),
        (hints_of("none", "low"), (1, 1.8), HardwareMode.OK),
        (hints_of("discrete"), (3, 35.1), HardwareMode.OFFLOAD_ONLY),
        (hints_of("discrete"), (40, 10), HardwareMode.TOO_WEAK),
    ],
)
def test_the_thresholds(hints, thresholds, mode):
    assessment = assess_hardware(*thresholds, hints=hints)
    assert assessment.mode is mode and assessment.reason.startswith(f"estimated {assessment.tok_per_s:g} tok/s, ")


# ---- estimates ------------------------------------------------------------------------


def cost_of(tmp_path, **sizes):
    path = tmp_path / "x.gguf"
    path.write_bytes(build_model(**sizes))
    with open_gguf(path) as gguf:
        return compute_model_cost(gguf)


def test_the_cost_of_a_model_counts_what_a_token_reads(tmp_path):
    assert cost_of(tmp_path) == ModelCost(n_params=30_912, bytes_per_token=4 * 30_912)  # a tied table is the output
    halved = cost_of(tmp_path, kind=GgmlType.F16)
    assert halved.n_params == 30_912 and halved.bytes_per_token < 0.51 * 4 * 30_912


def test_unused_experts_and_untied_embeddings_cost_nothing():
    def tensor(*shape):
        return types.SimpleNamespace(shape=shape, size_bytes=shape[0] * shape[1] * 2)

    tensors = {
        "token_embd.weight": tensor(64, 1000),
        "output.weight": tensor(64, 1000),
        "blk.0.ffn_up_exps.weight": tensor(64, 800),
        "blk.0.attn_q.weight": tensor(64, 64),
    }
    metadata = {"general.architecture": "moe", "moe.expert_count": 8, "moe.expert_used_count": 2}
    header = types.SimpleNamespace(metadata=metadata, tensors=tensors)
    expected = 64 * 1000 + 64 * 800 // 4 + 64 * 64
    assert compute_model_cost(header) == ModelCost(n_params=expected, bytes_per_token=2 * expected)
    header.metadata = LLAMA
    assert compute_model_cost(header).n_params == 64 * 1000 + 64 * 800 + 64 * 64


SPEED = MachineSpeed(memory_bytes_per_s=25e9, multiply_adds_per_s=640e6, cores=1)
COST = ModelCost(n_params=134_500_000, bytes_per_token=143_000_000)


def test_estimates_follow_size_memory_and_engine():
    llama = estimate_tok_per_s("llama", COST, SPEED)
    builtin = estimate_tok_per_s("builtin", COST, SPEED)
    assert llama == pytest.approx(105, rel=0.01)  # measured with these: 105 by one thread, 144 by two
    assert builtin == pytest.approx(3.8, rel=0.01)  # measured: 4.1
    twice = ModelCost(n_params=2 * COST.n_params, bytes_per_token=2 * COST.bytes_per_token)
    assert estimate_tok_per_s("llama", twice, SPEED) == llama / 2
    assert estimate_tok_per_s("builtin", twice, SPEED) == builtin / 2
    two_cores = MachineSpeed(memory_bytes_per_s=25e9, multiply_adds_per_s=640e6, cores=2)
    assert estimate_tok_per_s("builtin", COST, two_cores) == pytest.approx(1.3 * builtin)
    assert estimate_tok_per_s("llama", COST, SPEED, gpu_class=GpuClass.DISCRETE) > 5 * llama
    assert estimate_tok_per_s("llama", COST, SPEED, gpu_class=GpuClass.INTEGRATED) == llama
    assert estimate_tok_per_s("http://127.0.0.1:11434", COST, SPEED) is None


def test_the_built_in_engine_as_the_readme_measured_it():
    assert estimate_builtin_tok_per_s(15_200_000) == pytest.approx(33, rel=0.05)
    assert estimate_builtin_tok_per_s(0) > 0


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "BANDWIDTH_BUFFER_BYTES", 1 << 20)
    speed = probe_machine_speed()
    assert speed.memory_bytes_per_s > 0 and speed.multiply_adds_per_s > 0 and speed.cores >= 1


def test_measuring_memory_leaves_memory_to_others(monkeypatch):
    taken = []
    real = ctypes.create_string_buffer
    monkeypatch.setattr(ctypes, "create_string_buffer", lambda size: taken.append(size) or real(size))
    dvai_bridge._measure_memory(64 << 20, 2)
    assert sum(taken) == 2 * (64 << 20) // dvai_bridge.BANDWIDTH_FREE_SHARE


# ---- scores ---------------------------------------------------------------------------

KEY = ScoreKey(model_id="m", engine="builtin", quantization="Q8_0")
MEASURED = Score(
    model_id="m",
    device_id="d",
    library_version=dvai_bridge.__version__,
    tok_per_s=12.3456,
    source=ScoreSource.MEASURED,
    measured_at_ms=1_700_000_000_000,
    prefill_tok_per_s=99.5,
)
WIRE = {
    "modelId": "m",
    "deviceId": "d",
    "libraryVersion": dvai_bridge.__version__,
    "tokPerSec": 12.35,
    "source": "probe",
    "measuredAt": 1_700_000_000_000,
    "prefillTokPerSec": 99.5,
}


def usage_of(completion=21, predicted_ms=1000.0, prompt=40, cached=0, prompt_ms=500.0):
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        prompt_ms=prompt_ms,
        predicted_ms=predicted_ms,
    )


def test_a_score_on_the_wire():
    assert build_scores_json([MEASURED]) == {"scores": [WIRE]}
    assert parse_score_json(WIRE).source is ScoreSource.MEASURED
    bare = {"modelId": "m", "deviceId": "d", "tokPerSec": 3}
    assert parse_score_json(bare).source is ScoreSource.HEURISTIC and parse_score_json(bare).prefill_tok_per_s is None
    assert build_score_json(parse_score_json(WIRE)) == WIRE


@pytest.mark.parametrize(
    "change",
    [
        {"modelId": ""},
        {"modelId": 5},
        {"modelId": "a\nb"},
        {"modelId": "x" * 600},
        {"deviceId": None},
        {"tokPerSec": -1},
        {"tokPerSec": True},
        {"tokPerSec": "12"},
        {"tokPerSec": 1e9},
        {"tokPerSec": float("nan")},
        {"tokPerSec": None},
        {"measuredAt": "now"},
        {"measuredAt": -5},
        {"measuredAt": float("nan")},
        {"prefillTokPerSec": []},
    ],
)
def test_what_a_peer_may_not_say(change):
    with pytest.raises(ValueError):
        parse_score_json(WIRE | change)
    assert parse_scores_json({"scores": [WIRE | change, WIRE]}) == (parse_score_json(WIRE),)


def test_a_peers_list_is_bounded():
    assert len(parse_scores_json({"scores": [WIRE] * 100_000})) == dvai_bridge.SCORES_LIMIT
    for answer in (None, [], {}, {"scores": {}}, {"scores": None}):
        with pytest.raises(ValueError):
            parse_scores_json(answer)


def test_a_measurement_beats_an_estimate_beats_the_heuristic():
    def choose(measured, estimated):
        return choose_score(
            KEY, "me", measured=measured, estimated_tok_per_s=estimated, hints=hints_of("integrated"), now_ms=5
        )

    assert choose(MEASURED, 50.0) == dvai_bridge.replace(MEASURED, device_id="me")
    assert (choose(None, 50.0).tok_per_s, choose(None, 50.0).source) == (50.0, ScoreSource.ESTIMATE)
    assert (choose(None, None).tok_per_s, choose(None, None).source) == (8.0, ScoreSource.HEURISTIC)
    assert build_score_json(choose(None, 50.0))["source"] == "heuristic"


def test_traffic_moves_the_average_by_a_fifth():
    first = average_score(None, KEY, "d", usage_of(), 7)
    assert (first.tok_per_s, first.prefill_tok_per_s, first.measured_at_ms) == (20.0, 80.0, 7)
    second = average_score(first, KEY, "d", usage_of(predicted_ms=2000.0, cached=39), 8)
    assert (second.tok_per_s, second.prefill_tok_per_s) == (18.0, 80.0)
    third = average_score(second, KEY, "d", usage_of(predicted_ms=1000.0, prompt_ms=1000.0), 9)
    assert third.tok_per_s == pytest.approx(18.4) and third.prefill_tok_per_s == pytest.approx(72.0)


@pytest.mark.parametrize("usage", [usage_of(completion=15), usage_of(predicted_ms=0.0), usage_of(completion=0)])
def test_short_answers_say_nothing(usage):
    assert average_score(MEASURED, KEY, "d", usage, 8) is None


def test_the_table_of_scores_comes_back_as_it_was():
    other = ScoreKey(model_id="m", engine="llama", quantization="Q4_K_M", n_gpu_layers=20, library_version="0.0.9")
    table = {KEY: MEASURED, other: dvai_bridge.replace(MEASURED, library_version="0.0.9", measured_at_ms=3)}
    found = parse_score_table(encode_score_table(table))
    assert found.keys() == table.keys() and found[other].measured_at_ms == 3
    assert found[KEY] == dvai_bridge.replace(MEASURED, tok_per_s=12.35)


def test_the_table_keeps_the_newest():
    table = {
        ScoreKey(model_id=f"m{n}", engine="e", quantization="q"): dvai_bridge.replace(
            MEASURED, model_id=f"m{n}", measured_at_ms=n
        )
        for n in range(dvai_bridge.SCORES_LIMIT + 10)
    }
    found = parse_score_table(encode_score_table(table))
    assert len(found) == dvai_bridge.SCORES_LIMIT and min(score.measured_at_ms for score in found.values()) == 10


def test_the_cache_survives_a_restart_and_forgets_other_versions(tmp_path):
    path = tmp_path / "cache" / "capability.json"
    cache = ScoreCache(path)
    cache.load()
    assert cache.get(KEY) is None and cache.list_scores() == ()
    cache.put(KEY, MEASURED)
    cache.flush()
    again = ScoreCache(path)
    again.load()
    assert again.get(KEY).tok_per_s == 12.35 and len(again.list_scores()) == 1
    assert again.get(dvai_bridge.replace(KEY, library_version="9")) is None
    assert again.get(dvai_bridge.replace(KEY, quantization="Q4_0")) is None
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def count_saves(monkeypatch):
    saves = []
    real = dvai_bridge.update_file
    monkeypatch.setattr(dvai_bridge, "update_file", lambda *words: saves.append(1) or real(*words))
    return saves


def test_the_disk_is_spared_small_changes(tmp_path, monkeypatch):
    saves = count_saves(monkeypatch)
    cache = ScoreCache(tmp_path / "capability.json")
    cache.flush()
    assert saves == []
    cache.observe(KEY, "d", usage_of(), 1)
    cache.flush()
    cache.flush()
    assert len(saves) == 1
    cache.observe(KEY, "d", usage_of(predicted_ms=1100.0), 2)  # moves the average by 2 %
    cache.flush()
    assert len(saves) == 1 and cache.get(KEY).tok_per_s < 20
    cache.observe(KEY, "d", usage_of(predicted_ms=3000.0), 3)
    cache.flush()
    assert len(saves) == 2


def test_short_requests_leave_the_cache_alone(tmp_path):
    cache = ScoreCache(tmp_path / "capability.json")
    cache.observe(KEY, "d", usage_of(completion=3), 1)
    cache.flush()
    assert cache.get(KEY) is None and not (tmp_path / "capability.json").exists()


def test_two_bridges_share_a_cache(tmp_path):
    path, other = tmp_path / "capability.json", dvai_bridge.replace(KEY, model_id="n")
    one, two = ScoreCache(path), ScoreCache(path)
    one.put(KEY, MEASURED)
    two.put(other, dvai_bridge.replace(MEASURED, model_id="n"))
    two.put(KEY, dvai_bridge.replace(MEASURED, tok_per_s=1.0, measured_at_ms=1))  # older than the other's
    one.flush()
    two.flush()
    found = ScoreCache(path)
    found.load()
    assert len(found.list_scores()) == 2 and found.get(KEY).tok_per_s == 12.35


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"scores": 5}', b'{"scores": [{}]}', b"\xff\xfe", b"null"])
def test_a_damaged_cache_is_an_empty_one(tmp_path, content):
    path = tmp_path / "capability.json"
    path.write_bytes(content)
    cache = ScoreCache(path)
    cache.load()
    assert cache.list_scores() == ()
    cache.put(KEY, MEASURED)
    cache.flush()
    again = ScoreCache(path)
    again.load()
    assert again.get(KEY) is not None


def test_a_cache_that_cannot_be_saved_warns_once(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    cache = ScoreCache(blocked / "capability.json")
    cache.load()
    for tok_per_s in (1.0, 2.0):
        cache.put(KEY, dvai_bridge.replace(MEASURED, tok_per_s=tok_per_s))
        cache.flush()
    warnings = [record for record in caplog.records if "not kept" in record.message]
    assert len(warnings) == 1 and cache.get(KEY).tok_per_s == 2.0


def test_the_cache_is_for_any_thread(tmp_path):
    cache = ScoreCache(tmp_path / "capability.json")

    def work(name):
        key = dvai_bridge.replace(KEY, model_id=name)
        for now_ms in range(50):
            cache.observe(key, "d", usage_of(predicted_ms=1000.0 + now_ms), now_ms)
        cache.flush()

    threads = [threading.Thread(target=work, args=(f"m{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = ScoreCache(tmp_path / "capability.json")
    again.load()
    assert len(again.list_scores()) == 4
