"""All instruction sets give the same bits, the scalar spec is right, and a broken kernel is noticed.

The work is done by kernels.c, compiled here with the system's C compiler. AVX-VNNI is run through the AVX-512
encoding of its instruction where the CPU has only that; `make test-arm` runs the NEON files under emulation.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from qwen3c.kernels.table import runnable_isas

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "qwen3c" / "kernels"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "cc"
FLAGS = ["-O2", "-std=c11", "-ffp-contract=off", "-DQWEN3C_EMULATE_AVXVNNI"]


def compile_object(source: Path, target: Path) -> None:
    headers = source.parent if (source.parent / "kernels.h").exists() else KERNELS
    subprocess.run([COMPILER, *FLAGS, f"-I{headers}", "-c", str(source), "-o", str(target)], check=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and the test program as object files, unlinked."""
    directory = tmp_path_factory.mktemp("objects")
    for source in [*KERNELS.glob("*.c"), Path(__file__).with_name("kernels.c")]:
        compile_object(source, directory / f"{source.stem}.o")
    return directory


def run(objects: Path, program: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Link and run: (exit status, kernel -> instruction set -> digest, output)."""
    subprocess.run([COMPILER, *map(str, sorted(objects.glob("*.o"))), "-lm", "-o", str(program)], check=True)
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    digests: dict[str, dict[str, str]] = defaultdict(dict)
    for line in result.stdout.splitlines():
        if len(fields := line.split()) == 3:
            digests[fields[0]][fields[1]] = fields[2]
    return result.returncode, digests, result.stdout


def test_every_instruction_set_gives_the_same_bits_as_the_spec(objects: Path, tmp_path: Path) -> None:
    status, digests, output = run(objects, tmp_path / "program")
    assert status == 0, output
    assert set(digests) == {"matmul", "rows", "rope", "attention", "top_k", "quantize_tiles", "not_finite"}
    for kernel, by_isa in digests.items():
        assert "scalar" in by_isa and len(set(by_isa.values())) == 1, f"{kernel}: {by_isa}"


# name: (kernel whose digest must change, file[:table], right text, wrong text). A changed header is compiled
# into the scalar table, or into the table named behind the colon
MUTATIONS = {
    "a dot product starts one off": ("products", "avx2.c", "_mm256_setzero_si256(), _mm256",
                                     "_mm256_set1_epi32(1), _mm256"),
    "AVX2 ignores the sign": ("products", "avx2.c", "_mm256_sign_epi8(x, w)", "x"),
    "half of the rows use other weights": ("matmul", "avx2.c", "w.high, w.high_abs, x)",
                                           "w.low, w.low_abs, x)"),
    "the activation scale is forgotten": ("matmul", "product.h", "f32_mul(scale, factor)", "scale"),
    "float products skip a group": ("matmul", "dequantize.h",
                                    "size_t g = 0; g < columns / group_size; g++, tiles",
                                    "size_t g = 1; g < columns / group_size; g++, tiles"),
    "the 17th group of a row has the scale of the first": ("matmul", "rows.h", "memcpy(row->scales + g, max",
                                                           "memcpy(row->scales, max"),
    "the sum of a group lacks its last codes": ("matmul", "rows.h", "sum = f32_add(sum, code);",
                                                "if (c + 16 < first + group_size) sum = f32_add(sum, code);"),
    "values are scaled as if they were weights": ("attention", "attend_int8.h",
        "matmul_int8_tiles(ENCODING_INT8, &product, 0);", "matmul_int8_tiles(ENCODING_INT8, &product, 1);"),
    "a part of a dot product is left out": ("matmul", "product.h", "for (size_t j = 1; j < J; j++)",
                                            "for (size_t j = 2; j < J; j++)"),
    "every part starts with the sum": ("matmul", "product.h:avxvnni", "dot_start(j ? 0 : sums)",
                                       "dot_start(j ? sums : sums)"),
    "the last block of tokens is left out": ("matmul", "product.h:avxvnni",
        "n = (p->n_tokens - token) / blocks--", "n = p->n_tokens / blocks"),
    "whole rows of values overlap": ("attention", "attend_float.h:avxvnni",
                                     "d += 2 * LANES * ATTEND_VECTORS)", "d += LANES * ATTEND_VECTORS)"),
    "rounding cuts": ("matmul", "scalar.c", "(a.lane[i] + 12582912.0f) - 12582912.0f", "truncf(a.lane[i])"),
    "rmsnorm forgets the tail": ("rows", "rows.h", "if (whole < n) {", "if (0) {"),
    "matvec forgets the tail": ("rows", "rows.h", "c < columns; c += LANES)",
                                "c + 15 < columns; c += LANES)"),
    "add_scaled adds": ("rows", "rows.h", "fmaf(scale, x[i], y[i])", "x[i] + y[i]"),
    "exp lacks a term": ("rows", "vector.h", "f32_set(1.0f / 6)", "f32_set(1.0f / 7)"),
    "rotation turns the other way": ("rope", "rope.h", "fmaf(x0, cosine[i], -(x1 * sine[i]))",
                                     "fmaf(x0, cosine[i], x1 * sine[i])"),
    "angles use a short pi": ("rope", "rope.h", "1.57079632679489655800", "1.5707963267"),
    "a token sees the next position": ("attention", "attend.h", "? position + 1 - start : KV_BLOCK;",
                                       "? position + 2 - start : KV_BLOCK;"),
    "blocks are merged unscaled": ("attention", "attend.h", "fmaf(out[d], factor[0], o[d] * factor[1])",
                                   "out[d] + o[d]"),
    "an unseen position has a weight": ("attention", "attend_int8.h",
                                        "for (size_t j = seen; j < end; j++) p[j] = 0;", ""),
    "int8 values change places": ("attention", "cache.h", "index / 4 * (LANES * 4) + index % 4",
                                  "index % 64 * 64 + index / 64"),
    "int8 weights are rounded to 5 bits": ("attention", "attend_int8.h", "quantize(&row, x, n, group_size);",
        "quantize(&row, x, n, group_size); for (size_t i = 0; i < n; i++) row.codes[i] &= ~3;"),
    "fp16 rounds half up": ("halves", "scalar.c", "0xfff + (bits >> 13 & 1)", "0x1000"),
    "a read passes the end": ("attention", "cache.h", "load_left(k + d, left, 0)", "f32_load(k + d)"),
    "top-k orders ties backwards": ("top_k", "sampler.h", "(x[a] == x[b] && a < b)",
                                    "(x[a] == x[b] && a > b)"),
    "the peak stops a round early": ("int8_peak", "peak.h", "round < rounds; round++",
                                     "round + 1 < rounds; round++"),
    "a group loses its NaN": ("not_finite", "rows.h",
                              "largest = f32_max_magnitude(largest, f32_abs(f32_load(x + i)))",
                              "largest = f32_max(largest, f32_abs(f32_load(x + i)))"),
    "AVX2 loses a NaN between its halves": ("not_finite", "lanes_avx2.h:avx2",
        "_mm256_max_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(a.high))",
        "_mm256_castps_si256(_mm256_max_ps(a.low, a.high))"),
    "AVX-512 loses a NaN in its last lanes": ("not_finite", "lanes_x86.h:avx512vnni",
                                              "_mm_max_epi32(b, _mm_srli_epi64(b, 32))", "b"),
    "the tile multiplier skips a group": ("matmul", "product_amx.h:amx", "size_t g = 1; g < strip->n;",
                                          "size_t g = 2; g < strip->n;"),
    "the tile multiplier starts each strip anew": ("matmul", "product_amx.h:amx",
        "strip->first ? load_left(y + t * p->stride, left, 0) : f32_set(0)", "f32_set(0)"),
    "the tile multiplier forgets the activation scale": ("matmul", "product_amx.h:amx",
        "f32_mul(scale, f32_set(four[t % 4 * x_groups]))", "scale"),
    "the tile multiplier takes half a group": ("matmul", "product_amx.h:amx", "c < group_size; c += depth",
                                               "c < group_size / 2; c += depth"),
    "the tile multiplier skips rows": ("matmul", "product_amx.h:amx", "n = (p->n_tokens - token) / blocks--;",
                                       "n = p->n_tokens / blocks;"),
    "an infinity becomes a scale": ("not_finite", "rows.h", "max[i] < INFINITY ? max[i] : NAN", "max[i]"),
    "the cache has codes for a NaN": ("not_finite", "halves.h",
                                      "if (!(max[0] < INFINITY)) max[0] = 0, scales[0] = NAN;", ""),
    "a key of infinity passes for one far away": ("not_finite", "attend.h",
                                                  "sum = f32_fma(score, f32_set(0), sum);", ""),
    "a first key of infinity passes for one far away": ("not_finite", "attend.h",
                                                        "sum = f32_mul(m, f32_set(0));", "sum = f32_set(0);"),
    "weights get the next scale": ("quantize_tiles", "halves.h",
                                   "if (max[r] > 127.5f * back[r]) halves[r]++;", "halves[r]++;"),
    "the blocks of a byte change places": ("matmul", "codes.h", "codes[i] = u6_nibbles(both, i);",
                                           "codes[i] = u6_nibbles(both, 1 - i);"),
    "the second half of the crumbs is the first": ("matmul", "codes.h", "(codes[i], crumbs, 2 * odd + i)",
                                                   "(codes[i], crumbs, i)"),
    "a codebook's high bits are read": ("matmul", "scalar.c", "(codebook[i % 16] + 32) & 63",
                                        "codebook[i % 16] + 32"),
    "AVX2 adds half of 8 columns": ("matmul", "avx2.c", "_mm256_maddubs_epi16(w, y));",
                                    "_mm256_maddubs_epi16(v, x));"),
    "packed codes are not centred": ("matmul", "product.h", "i32_set(j ? 0 : -sums / 4)", "i32_set(0)"),
    "the tile multiplier takes another row's codebook": ("matmul", "product_amx.h:amx",
        "u6_codebook_of(tiles) :", "u6_codebook_of(w->tiles) :"),
    "a row of an embedding has the crumbs of another": ("matmul", "codes.h", "column / 4 % 4 * 2 & 3",
                                                        "column / 4 % 2 * 2 & 3"),
    "every tile row has the first codebook": ("matmul", "dequantize.h",
                                              "*codebook = (const int8_t *)tiles;",
                                              "*codebook = (const int8_t *)p->matrix;"),
    "the last scale tried is taken": ("quantize_tiles", "tiles_fitted.h", "if (loss[r] < best->lost[r])",
                                      "if (1)"),
    "importance is forgotten": ("quantize_tiles", "tiles_fitted.h", "importance ? importance[first + c] : 1",
                                "1"),
    "a code is the one below": ("quantize_tiles", "tiles_fitted.h", "f32_set(2), f32_set(-0.5f)",
                                "f32_set(2), f32_set(-1.0f)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_noticed(objects: Path, tmp_path: Path, mutation: str) -> None:
    kernel, place, right, wrong = MUTATIONS[mutation]
    file, _, isa = place.partition(":")
    changed = isa or ("scalar" if file.endswith(".h") else Path(file).stem)
    if changed.startswith("avx") and platform.machine() != "x86_64":
        pytest.skip(f"{changed} is for x86-64")
    if changed == "amx" and changed not in runnable_isas():
        pytest.skip("this CPU has no tile multiplier")
    sources, mutated = tmp_path / "kernels", tmp_path / "objects"
    shutil.copytree(KERNELS, sources)
    shutil.copytree(objects, mutated)
    text = (sources / file).read_text()
    assert right in text, f"{file} no longer holds {right!r}"
    (sources / file).write_text(text.replace(right, wrong))
    compile_object(sources / f"{changed}.c", mutated / f"{changed}.o")
    status, digests, _ = run(mutated, tmp_path / "program", kernel)
    assert status != 0 or any(len(set(by_isa.values())) > 1 for by_isa in digests.values())
