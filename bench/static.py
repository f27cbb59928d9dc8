"""A roofline without a GPU: compile every row of the tuning table offline and count what its inner loop issues.

    python bench/static.py             every kernel, row and target; a few minutes
    python bench/static.py --quick     a small subset for CI

Per row: registers, spilled bytes, shared memory against the target's limit and blocks per multiprocessor. Per pair (i, j) of
the inner loop, thread instructions by pipe, beside the floor. A multiprocessor issues 128 lanes per clock and computes 16
exp2, so an exp2 costs eight issue slots whatever else happens; the tensor floor is in the same slots. A loop is as good
as its floor once it issues less than that.

Exits 1 when a row spills, does not fit, misses its tensor instruction, reads the row tile again, or breaks a bar below.
Rows are compiled for as many features as their bucket holds, apply for as many columns again (the gradient).
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # nothing compiles in the interpreter

import triton
from gpu_ot.kernels import absorb, absorbed, apply, check, dual, pairs, resident, scaling, softmin, step, tiles, tuning
from gpu_ot.kernels import streamed as streamed_kernels
from gpu_ot.kernels.launches import FUSED
from gpu_ot.kernels.scaling import both_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: sm_86 stands for the RTX 30 and 40, sm_120 for the RTX 50.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = tuning.SHARED  # bytes one block may use
RESERVED = dict.fromkeys(TARGETS, 1024) | {"gfx942": 0}  # bytes a block takes for itself
SHARED_SM = {arch: bytes + RESERVED[arch] for arch, bytes in SHARED.items()}
#: Of half-precision products summed in fp32, per clock and multiprocessor; tf32 runs at half of it.
HALF_FLOPS = {"sm_80": 2048, "sm_86": 512, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
STORED = {"pair": "*fp16", "half": "*fp16", "tf32": "*fp32"}

# Issued instructions per pair of the sm_90 loop, at most. "half" up to 64 features is what fp32 packs up to ten coordinates into.
BARS = {("softmin", "tf32", 16): 4.5, ("softmin", "tf32", 64): 5.5, ("softmin", "pair", 16): 8.5, ("softmin", "pair", 64): 12.0}
BARS |= {("softmin", "half", bucket): 8.5 for bucket in (16, 32, 64)}
BACKWARD = 2.0  # apply over softmin, same storage and bucket

PIPES = (
    ("ex2", r"MUFU\.EX2"),
    ("mufu", r"MUFU"),
    ("tensor", r"HGMMA|HMMA|QGMMA|WGMMA|IMMA|UTC.*MMA"),
    ("fp32", r"FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FSET|FCHK|F2F|I2F|F2I|HADD2|HFMA2|HMUL2"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM"),
    ("global", r"LDG|STG|LDGSTS|UBLKCP|UTMA|RED|ATOM"),
    ("local", r"LDL|STL"),
    ("shuffle", r"SHFL"),
    ("sync", r"BAR|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|WARPGROUP|FENCE|MEMBAR|ERRBAR|CCTL"),
    ("integer", r"."),  # integer arithmetic, moves, branches
)


def build(kernel, types: dict, constants: dict, target: GPUTarget, warps: int, stages: int = 2, **more):
    """The compiled kernel. Pointers and strides are taken as multiples of 16, as those of the launchers are."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "*fp32")
        if signature[name].startswith("*") or name in ("u_rows", "v_rows", "w_rows", "per_split"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    assert all(signature[name] in ("i32", "constexpr") for name in kernel.do_not_specialize if name in signature), (
        "a pointer loses its alignment"
    )
    options = dict(num_warps=warps, num_stages=stages, **FUSED, **more)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


INTEGERS = dict.fromkeys(
    ("n", "m", "c", "u_rows", "v_rows", "w_rows", "splits", "per_split", "C_stride", "parts", "per_part", "max_iter"), "i32"
)
WHOLE = dict.fromkeys(
    ("n", "m", "batch", "a_stride", "b_stride", "logs_stride", "C_stride", "parts", "blocks", "iterations", "plain", "known"), "i32"
)
SCALARS = INTEGERS | dict.fromkeys(("eps", "loss_a", "loss_b", "tol"), "fp32")


def streamed(kernel: str, storage: str, bucket: int, tile: tuning.Tile, target: GPUTarget, ragged: bool = False):
    """A row of the table, compiled: (binary, bytes of one column tile, tensor flops per pair at half-precision rate).

    kernel is "softmin", "vector", "apply" for w = v (the gradient), or "other" for a w of its own in the rows of "apply"; ragged is
    the variant for batches that are padded.
    """
    arch = next(name for name, known in TARGETS.items() if known == target)
    D, parts = bucket or 320, 2 if storage == "pair" else 1
    C = 1 if kernel == "vector" else D
    same = kernel == "apply" and storage != "tf32" and D <= 128
    types = SCALARS | dict(u=STORED[storage], v=STORED[storage], w="*fp32" if C == 1 else "*fp16", rows_used="*i32", columns_used="*i32")
    constants = dict(
        D=D, PARTS=parts, Q={16: 2, 32: 5, 64: 10}.get(D, 0) if storage == "half" else 0, SPARE=storage == "tf32" and D <= 32,
        BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, STAGES=tile.stages,
    )  # fmt: skip
    column = D * (4 if storage == "tf32" else 2 * parts)
    flops = 2 * D * {"pair": 3, "half": 1, "tf32": 2}[storage]
    if kernel == "softmin":
        constants |= dict(
            SHIFTED=True, RAGGED=ragged, CENTRED=True, UPDATE=0 if (arch, storage, bucket, tile.block_n) in tuning.FULL else 2
        )  # as iterations are run
        types |= dict.fromkeys(("out", "shift", "centre", "offset", "potential", "logs", "next_centre"), "*fp64")
        types |= dict.fromkeys(("eps_64", "damping", "limit"), "fp64") | dict(logs_stride="i32")
    else:
        chunk = D if same else min(C, tile.block_c)
        pairs = 2 if storage == "pair" or (kernel == "other" and constants["Q"]) else 1  # fp32 packs few coordinates, never w
        constants |= dict(WIDTH=C, C=chunk, W_PARTS=0 if C == 1 else pairs, SAME=same, RAGGED=ragged)
        column += 0 if C == 1 or same else 2 * chunk * pairs
        flops += 0 if C == 1 else 2 * chunk * (3 if pairs == 2 else 1)
    function = softmin.softmin_kernel if kernel == "softmin" else apply.apply_kernel
    return build(function, types, constants, target, tile.warps, tile.stages), column * tile.block_m, flops


def resources(binary, architecture: str) -> dict:
    """Registers per thread, spilled bytes per thread, shared bytes per block, blocks per multiprocessor."""
    shared = binary.metadata.shared
    warps = binary.metadata.num_warps
    if architecture == "gfx942":
        text = binary.asm["amdgcn"]
        registers, scratch, lost = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1]) for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        spilled = scratch + 4 * lost
        # 512 registers per lane and SIMD, four SIMDs, in steps of eight
        blocks = 4 * (512 // (-(-registers // 8) * 8)) // warps
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary.asm["cubin"])
            f.flush()
            command = [_tool("cuobjdump"), "--dump-resource-usage", f.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers = max(int(r) for r in re.findall(r"REG:(\d+)", text))
        spilled = max(int(r) for r in re.findall(r"STACK:(\d+)", text)) + max(int(r) for r in re.findall(r"LOCAL:(\d+)", text))
        blocks = 65536 // (32 * warps * (-(-registers // 8) * 8))
    return dict(
        registers=registers,
        spilled=spilled,
        shared=shared,
        blocks=min(blocks, SHARED_SM[architecture] // max(1, shared + RESERVED[architecture])),
    )


def _tool(name: str) -> str:
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def loops(cubin: bytes) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of every innermost loop that computes an exp2, in order of appearance."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([_tool("nvdisasm"), "-c", f.name], capture_output=True, text=True, check=True).stdout
    code, labels, jumps = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            to = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and to:
                jumps.append((to[1], len(code)))
            code.append(found[1])
    spans = [(labels[to], end) for to, end in jumps if labels.get(to, end + 1) <= end]
    hot = [(a, b) for a, b in spans if any(op.startswith("MUFU.EX2") for op in code[a : b + 1])]
    inner = [(a, b) for a, b in hot if not any((c, e) != (a, b) and a <= c and e <= b for c, e in hot)]
    return code, [code[a : b + 1] for a, b in sorted(inner)]


def mix(body: list[str], warps: int, pairs: int) -> dict[str, float]:
    """Thread instructions per pair, by pipe: one SASS instruction is 32 of them, and every warp of the block issues it."""
    count = collections.Counter(next(name for name, pattern in PIPES if re.match(pattern, op)) for op in body)
    return {name: count[name] * warps * 32 / pairs for name, _ in PIPES} | {"issued": len(body) * warps * 32 / pairs}


def fetched(body: list[str], warps: int) -> int:
    """Bytes of points that one turn of the loop reads from global memory; points travel 16 bytes at a time, vectors do not."""
    return sum(16 * 32 * warps for op in body if op.startswith("LDG") and op.endswith("128"))


def examine(kernel: str, arch: str, storage: str, bucket: int, thin: bool) -> tuple[str, list[str], float]:
    """One row of the table: (a line to print, what is wrong with it, issued per pair)."""
    tile = tuning.row("apply" if kernel == "other" else kernel, arch, storage, bucket, thin)
    binary, column, flops = streamed(kernel, storage, bucket, tile, TARGETS[arch])
    used = resources(binary, arch)
    shape = f"{tile.block_n}x{tile.block_m}x{tile.warps} s{tile.stages}"
    if not thin:  # a batch of ragged problems runs code of its own
        batched = resources(streamed(kernel, storage, bucket, tile, TARGETS[arch], ragged=True)[0], arch)
        used |= {key: max(used[key], batched[key]) for key in ("registers", "spilled", "shared")}
    wrong = ["spills"] * (used["spilled"] > 0) + ["too much shared memory"] * (used["shared"] > SHARED[arch])
    line = f"{arch:7}{kernel:8}{storage:5}{bucket or '>256':>5}{' thin' if thin else '     '} {shape:15}" + summary(used)
    if arch == "gfx942":
        return line, wrong + ["no matrix instruction"] * ("v_mfma" not in binary.asm["amdgcn"]), 0.0
    if not bucket:  # nested loops have no count per pair
        return line, wrong, 0.0
    pairs = tile.block_n * tile.block_m
    code, bodies = loops(binary.asm["cubin"])
    counted = [(mix(body, tile.warps, pairs), body) for body in bodies]
    counted = sorted((x for x in counted if x[0]["ex2"] > 0.5), key=lambda x: x[0]["issued"])  # an exp2 per pair, not per row
    counts, body = counted[0]  # of softmin's two loops, the shifted one
    floor = max(8.0, flops / HALF_FLOPS[arch] * 128)
    line += f"  issued {counts['issued']:5.2f} floor {floor:5.1f}  "
    line += " ".join(f"{k} {v:.2f}" for k, v in counts.items() if v >= 0.005 and k != "issued")
    if kernel == "softmin":
        line += f"  | running maximum: issued {counted[-1][0]['issued']:.2f}"
    # On sm_100 one elected thread issues the tensor instruction, and the compiler may place that outside the body of the loop.
    tensor = mix(code, tile.warps, pairs)["tensor"] if arch == "sm_100" else counts["tensor"]
    wrong += ["no tensor instruction"] * (not tensor)
    wrong += ["the row tile is read again"] * (fetched(body, tile.warps) > column)
    if arch == "sm_90" and not thin and counts["issued"] > BARS.get((kernel, storage, bucket), float("inf")):
        wrong.append(f"issues more than {BARS[kernel, storage, bucket]}")
    return line, wrong, counts["issued"]


def summary(used: dict) -> str:
    return f"{used['registers']:4} regs {used['spilled']:4} B spilled {used['shared'] / 1024:6.1f} KiB {used['blocks']:2} blocks"


def of(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def examine_resident(arch: str, n: int, m: int, mixing: bool) -> tuple[str, list[str]]:
    block_n, block_m, warps = resident.shape(n, m, mixing)
    more = {} if arch == "gfx942" else dict(maxnreg=resident.REGISTERS[mixing])
    vectors = of("*fp64", "a b f_before g_before start f g fresh_g changes moves last trial numbers proposed")
    types = SCALARS | WHOLE | vectors | of("fp64", "eps_64 tau_a tau_b") | dict(done="*i1")
    constants = dict(
        LOSS=True, MIXING=mixing, GAUGE=False, SHIFT=True, DONE=True, MEMORY=3, SLOTS=4, STEP=min(block_m, 32 * warps),
        BLOCK_N=block_n, BLOCK_M=block_m,
    )  # fmt: skip
    used = resources(build(resident.run_kernel, types, constants, TARGETS[arch], warps, **more), arch)
    line = f"{arch:7}resident {n}x{m}{' mixing' * mixing}".ljust(33) + f"{block_n}x{block_m}x{warps}".ljust(15) + summary(used)
    return line, ["spills"] * (used["spilled"] > 0)


def vector_kernels() -> list[tuple[str, object, dict, dict, int]]:
    """What an iteration and a check do to vectors: (name, kernel, types, constants, warps), each in its most demanding form."""
    numbers = of("*fp64", "a b f g g_next changes moves last trial numbers out") | of("fp64", "eps tau_a tau_b")
    flags = dict(done="*i1", inexact="*i1", old_done="*i1", exact="*i1")
    checked = of("*fp64", "b f g g_next old_f old_g old_error new_f new_g error sizes flags") | of("fp64", "slope tol sums differences far")
    rows = []
    for m in (64, 5000):
        block, warps = step.shape(m)
        constants = dict(KNOWN=1, GAUGE=True, SHIFT=True, DONE=True, INEXACT=True, MEMORY=3, SLOTS=4, BLOCK=block)
        rows.append((f"propose {m}", step.propose_kernel, numbers | flags, constants, warps))
    for norm in range(len(check.NORMS)):
        constants = dict(NORM=norm, LAST=True, PLAIN=False, INEXACT=True, ALONE=False, BLOCK=1024)
        rows.append((f"check {check.NORMS[norm]}", check.check_kernel, checked | flags, constants, 8))
    rows.append(("flags", check.flags_kernel, checked, dict(BLOCK=1024), 4))
    rows.append(("sizes", check.size_kernel, checked, dict(SQUARE=True, BLOCK=1024), 8))
    for dtype in ("*fp32", "*fp64"):
        types = of("*fp64", "a b p c f0 g0 f g g_next sizes") | of("fp64", "eps damping_a damping_b safe") | of(dtype, "s sums before w t")
        tile = dict(BLOCK=absorbed.BLOCK)
        rows.append((f"weigh {dtype}", absorbed.weigh_kernel, types, tile, 4))
        rows.append((f"again {dtype}", absorbed.again_kernel, types, tile | dict(POWER=True), 4))
        rows.append((f"potentials {dtype}", absorbed.potentials_kernel, types, tile | dict(POWER=True, LONG=True), 4))
    constants = dict(HOLD=True, INEXACT=True, PROBLEMS=64, BLOCKS=32, BLOCK=absorbed.BLOCK)
    rows.append(("settle", absorbed.settle_kernel, types | flags, constants, 4))
    found = of("*fp64", "f0 s") | of("fp64", "eps safe floor") | dict(exact="*i1")
    rows.append(("absorbed softmin", absorbed.softmin_kernel, found, dict(BLOCK=absorbed.BLOCK), 4))
    centred = of("*fp64", "g logs beta centre last last_logs last_offset last_centre") | of("fp64", "eps damping limit")
    centred |= of("*i32", "columns_used last_used") | of("i32", "last_stride")
    rows.append(("centre", streamed_kernels.centre_kernel, centred, dict(BLOCK=2048), 8))
    joined = of("*fp64", "pieces out centre offset potential logs next_centre") | of("fp64", "eps_64 damping limit") | of("i32", "splits")
    rows.append(("join", softmin.join_kernel, joined | dict(eps="fp32"), dict(UPDATE=2, SPLITS=64, BLOCK=128), 4))
    wide = of("*fp64", "k h alpha beta factor") | of("*i32", "rows_used columns_used") | dict(eps="fp64")
    rows.append(("exponents", apply.exponents_kernel, wide, dict(BLOCK=1024), 8))
    absorbing = of("*fp32", "C g_high g_low f_high f_low K") | of("*fp64", "f_out") | of("fp32", "scale dropped")
    rows += [
        (f"absorb{' at f' * given}", absorb.absorb_kernel, absorbing, dict(GIVEN=given, BLOCK=absorb.BLOCK), 4) for given in (False, True)
    ]
    valued = of("*fp64", "a b f g s D grad k h w grad_a grad_b") | of("fp64", "eps tau_a tau_b")
    rows.append(("dual", dual.dual_kernel, valued, dict(ROWS=1, COLUMNS=2, BLOCK=512), 8))
    rows.append(("pull", dual.pull_kernel, valued, dict(ROWS=1, COLUMNS=2, BLOCK=512), 8))
    listed = of("*fp64", "x_centres y_centres tops logs") | of("*i64", "starts tiles") | of("i32", "columns")
    for weighed in (False, True):
        constants = dict(WEIGHED=weighed, BLOCK=pairs.BLOCK, WIDTH=pairs.WIDTH)
        rows.append((f"pairs{' of v' * weighed}", pairs.pairs_kernel, listed, constants, pairs.WARPS))
    points = of("*fp64", "x top") | of("*fp16", "data") | of("i32", "d batch_stride row_stride stride columns width")
    for q in (0, 10):
        rows.append((f"points {q}", tiles.split_kernel, points, dict(Q=q, ROWS=32, COLUMNS=64), 4))
    return rows


def examine_vectors(arch: str, name: str, kernel, types: dict, constants: dict, warps: int) -> tuple[str, list[str]]:
    used = resources(build(kernel, WHOLE | types, constants, TARGETS[arch], warps), arch)
    return f"{arch:7}{name}".ljust(33) + f"x{warps}".ljust(15) + summary(used), ["spills"] * (used["spilled"] > 0)


def examine_scaling(arch: str, dtype: str, m: int) -> tuple[str, list[str]]:
    """Both products of an iteration on a stored matrix, for a KL penalty: the hard one needs less."""
    block_n, block_m, warps, ahead = scaling.shape(2**15, m, 4 if dtype == "fp32" else 8, 64 if arch == "gfx942" else 32)
    types = SCALARS | dict.fromkeys(("K", "w", "s", "t"), f"*{dtype}") | dict.fromkeys(("a", "p", "c"), "*fp64") | dict(a_stride="i32")
    constants = dict(POWER=True, AHEAD=ahead, BLOCK_N=block_n, BLOCK_M=block_m)
    used = resources(build(both_kernel, types, constants, TARGETS[arch], warps), arch)
    line = f"{arch:7}scaling {dtype} {m}".ljust(26) + f"{block_n}x{block_m}x{warps}".ljust(15) + summary(used)
    return line, ["spills"] * (used["spilled"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fp32 with 64 features on every target, and tf32 with 16 on sm_90")
    parser.add_argument("--arch", choices=TARGETS, help="one target only")
    options = parser.parse_args()
    keys = [(*key, bucket, thin) for key in tuning.TABLE for bucket in tuning.BUCKETS for thin in (False, True)]
    keys = [k for k in keys if not k[-1] or tuning.row(*k) != tuning.row(*k[:-1], False)]
    small = [(16, 16), (64, 64), (128, 128), (256, 256), (1024, 1024)]
    long = [("fp32", m) for m in (64, 512, 4096, 8192, 16384)] + [("fp64", m) for m in (64, 512, 2048, 4096, 8192)]
    keys += [("other", *k[1:]) for k in keys if k[0] == "apply" and k[2] != "tf32" and 0 < k[3] <= 128]  # w is not v
    if options.quick:
        keys = [
            k for k in keys if not k[-1] and (k[2:4] == ("pair", 64) or k[1:4] == ("sm_90", "tf32", 16)) and k[0] in ("softmin", "apply")
        ]
        small, long = [(64, 64)], [("fp32", 4096), ("fp64", 8192)]
    failures, issued = 0, {}
    for key in keys:
        if options.arch in (None, key[1]):
            line, wrong, issued[key] = examine(*key)
            forward = issued.get(("softmin", *key[1:]))
            if key[:2] == ("apply", "sm_90") and 0 < key[3] <= 64 and not key[4] and forward:
                line += f"  {issued[key] / forward:.2f}x softmin"
                wrong += [f"costs more than {BACKWARD} softmins"] * (issued[key] / forward > BACKWARD)
            failures += report(line, wrong)
    for arch in TARGETS:
        if options.arch not in (None, arch):
            continue
        for n, m in small:
            for mixing in (False, True):
                failures += report(*examine_resident(arch, n, m, mixing))
        for row in vector_kernels():
            failures += report(*examine_vectors(arch, *row))
        for dtype, m in long:
            failures += report(*examine_scaling(arch, dtype, m))
    print(f"{failures} rows fail" if failures else "every row fits, without spills, within its bars")
    return failures > 0


def report(line: str, wrong: list[str]) -> bool:
    print(line + "".join(f"  FAILS: {x}" for x in wrong), flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
