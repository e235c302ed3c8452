"""The crop decoder itself: pixels against Pillow, threads, jobs that are cancelled, processes that fork or end."""

from __future__ import annotations

import contextlib
import gc
import io
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from decoder_threads import assert_no_thread_is_left, eventually, our_threads
from jpeg_files import pillow_jpeg
from PIL import Image

from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.native.decoder import FILE_DTYPE, Decoder, Job
from sdpnet.pipelines.native.status import Status

pytestmark = pytest.mark.usefixtures("native", "earlier_loaders_collected")


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(2)
    yield made
    made.close()


def jpeg_of(pixels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return np.frombuffer(file.getvalue(), np.uint8)


class Samples:
    """A batch of stored images, and what `Decoder.submit` wants to know of them."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.image_sizes = rng.integers(20, 200, (count, 2), dtype=np.int32)
        self.pixels = [make_image(seed + i, *size) for i, size in enumerate(self.image_sizes.tolist())]
        self.raw = np.arange(count) % 3 == 2
        self.flips = rng.random(count) < 0.5
        low = rng.integers(0, self.image_sizes - 8)
        extent = rng.integers(8, self.image_sizes - low, endpoint=True)
        self.boxes = np.concatenate([low, extent], axis=1).astype(np.int32)
        self.stored = [p.reshape(-1) if r else jpeg_of(p) for p, r in zip(self.pixels, self.raw, strict=True)]

    def submit(self, decoder: Decoder, output: np.ndarray) -> Job:
        addresses = np.array([stored.ctypes.data for stored in self.stored], np.uint64)
        nbytes = np.array([stored.nbytes for stored in self.stored], np.int64)
        return decoder.submit(addresses, nbytes, self.image_sizes, self.boxes, self.raw, self.flips, output)

    def expected(self, height: int, width: int) -> np.ndarray:
        images = []
        for stored, pixels, raw, box, flip in zip(
            self.stored, self.pixels, self.raw, self.boxes.tolist(), self.flips, strict=True
        ):
            image = Image.fromarray(pixels) if raw else Image.open(io.BytesIO(stored.tobytes()))
            top, left, box_height, box_width = box
            crop = image.crop((left, top, left + box_width, top + box_height))
            resized = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
            images.append(resized[:, ::-1] if flip else resized)
        return np.stack(images)


def finish(job: Job) -> None:
    while not job.wait(50):
        pass
    job.release()


def blank(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.full((count, height, width, 3), 77, np.uint8)


def decoded(samples: Samples, threads: int) -> np.ndarray:
    output = blank(len(samples.stored))
    decoder = Decoder(threads)
    job = samples.submit(decoder, output)
    finish(job)
    assert (job.statuses == Status.OK).all()
    decoder.close()
    return output


def test_crops_and_flips_equal_pillows() -> None:
    samples = Samples(40)
    difference = np.abs(decoded(samples, 2).astype(int) - samples.expected(24, 32)).mean((1, 2, 3))
    assert difference.mean() <= 1 and difference.max() <= 4


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    samples = Samples(37, seed=5)
    assert np.array_equal(decoded(samples, threads), decoded(samples, 1))


def test_jobs_wait_for_each_other_and_finish(decoder: Decoder) -> None:
    batches = [Samples(5, seed) for seed in range(12)]
    outputs = [blank(5) for _ in batches]
    jobs = [samples.submit(decoder, output) for samples, output in zip(batches, outputs, strict=True)]
    for job in reversed(jobs):
        finish(job)
    for samples, output in zip(batches, outputs, strict=True):
        assert np.array_equal(output, decoded(samples, 1))


def test_a_damaged_sample_is_black_and_the_others_are_whole(decoder: Decoder) -> None:
    samples, whole = Samples(9), Samples(9)
    samples.stored[4] = samples.stored[4][: samples.stored[4].nbytes // 2].copy()  # truncated
    samples.stored[6] = np.zeros(300, np.uint8)  # no JPEG at all
    samples.image_sizes[0] += 1  # another size than the file's
    expected, output = decoded(whole, 1), blank(9)
    job = samples.submit(decoder, output)
    finish(job)
    assert job.statuses.tolist() == [Status.DAMAGED if i in (0, 4, 6) else Status.OK for i in range(9)]
    assert [bool(job.message(i)) for i in range(9)] == [i in (0, 4, 6) for i in range(9)]
    height, width = whole.image_sizes[0]
    assert f"{height} x {width} pixels, but the shard says {height + 1} x {width + 1}" in job.message(0)
    expected[[0, 4, 6]] = 0
    assert np.array_equal(output, expected)


@pytest.mark.parametrize(
    "change",
    [(0, -1), (1, -1), (2, 0), (3, -5), (2, 10_000), (0, 2**31 - 1), (3, 2**31 - 1), (2, -(2**31)), (0, -(2**31))],
)
def test_a_box_outside_its_image_is_refused_before_any_work(decoder: Decoder, change: tuple[int, int]) -> None:
    samples, output = Samples(3), blank(3)
    samples.boxes[1, change[0]] = change[1]
    with pytest.raises(
        ValueError, match=r"sample 1 of the batch: the box \[.*\] is not inside its image of \[.*\] pix"
    ):
        samples.submit(decoder, output)
    assert (output == 77).all()


def test_arrays_of_another_kind_are_refused(decoder: Decoder) -> None:
    samples = Samples(3)
    for wrong in (blank(3).astype(np.float32), blank(3)[:, :, ::2], blank(3)[..., :2].copy(), blank(4)):
        with pytest.raises(ValueError, match="need "):
            samples.submit(decoder, wrong)
    samples.boxes = samples.boxes.astype(np.int64)
    with pytest.raises(ValueError, match=r"got int64 \(3, 4\), need int32 \(3, 4\)"):
        samples.submit(decoder, blank(3))


LARGE = np.zeros((2000, 2000, 3), np.uint8)


def long_job(decoder: Decoder, output: np.ndarray) -> Job:
    """Reduces 4 million pixels for each sample: some milliseconds each."""
    count = len(output)
    return decoder.submit(
        np.full(count, LARGE.ctypes.data, np.uint64),
        np.full(count, LARGE.nbytes, np.int64),
        np.full((count, 2), 2000, np.int32),
        np.tile(np.array([0, 0, 2000, 2000], np.int32), (count, 1)),
        np.ones(count, bool),
        np.zeros(count, bool),
        output,
    )


def test_a_released_job_is_not_begun_any_more() -> None:
    decoder = Decoder(1)
    first, second = blank(20), blank(2)
    busy = long_job(decoder, first)
    waiting = long_job(decoder, second)
    waiting.release()
    finish(busy)
    finish(long_job(decoder, blank(1)))  # the thread has looked at all that was queued
    assert (second == 77).all() and (first == 0).all()
    decoder.close()


def test_a_job_released_under_way_is_not_finished(decoder: Decoder) -> None:
    output = blank(3000)
    job = long_job(decoder, output)
    assert eventually(lambda: bool((output[0] == 0).all()))
    job.release()
    done = (output == 0).all((1, 2, 3))
    assert done[0] and not done[-1]
    assert ((output == 77).all((1, 2, 3)) | done).all(), "each sample is whole or untouched"


def test_closing_with_jobs_under_way_leaves_no_thread() -> None:
    assert_no_thread_is_left()
    decoder = Decoder(3)
    assert len(our_threads()) == 3
    outputs = [blank(2000) for _ in range(2)]
    jobs = [long_job(decoder, output) for output in outputs]
    decoder.close()
    assert_no_thread_is_left()
    assert (outputs[0][-1] == 77).all() and (outputs[1] == 77).all(), "cancelled, not finished"
    decoder.close()
    for job in jobs:
        job.release()
    with pytest.raises(RuntimeError, match="closed"):
        jobs[0].wait(1)
    with pytest.raises(RuntimeError, match="closed"):
        long_job(decoder, blank(1))


def test_what_is_forgotten_is_cancelled() -> None:
    decoder = Decoder(2)
    for _ in range(20):
        long_job(decoder, blank(1000))  # at once collected, with its output
    del decoder
    gc.collect()
    assert_no_thread_is_left()


def test_signals_go_to_the_main_thread() -> None:
    assert_no_thread_is_left()
    decoder = Decoder(2)

    def blocked(task: Path) -> list[bool]:
        line = next(line for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk:"))
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)  # the last must reach the fault handler
        return [int(line.split()[1], 16) >> (number - 1) & 1 == 1 for number in numbers]

    decoder.read_ahead(np.zeros(1, np.uint64), np.ones(1, np.int64))
    assert len(our_threads()) == 3
    # A thread that has not begun yet blocks all.
    assert eventually(lambda: all(blocked(task) == [True, True, False] for task in our_threads()))
    assert blocked(Path("/proc/self")) == [False, False, False]
    decoder.close()


def run_script(body: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    path = [str(folder) for folder in (here, here.parent, here.parent / "support", here.parents[1])]
    start = f"import sys; sys.path[:0] = {path!r}\nfrom test_native_decoder import *\n"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", start + body]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_forked_child_neither_hangs_nor_crashes() -> None:
    done = run_script("""
decoder = Decoder(2)
jobs = [long_job(decoder, blank(20)) for _ in range(3)]
decoder.read_ahead(np.zeros(1, np.uint64), np.ones(1, np.int64))
child = os.fork()
if child == 0:
    for refused in (lambda: jobs[0].wait(10), lambda: long_job(decoder, blank(1))):
        try:
            refused()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            sys.exit(3)
    jobs.clear()
    del decoder
    gc.collect()
    own = Decoder(2)
    finish(long_job(own, blank(3)))
    sys.exit(7)  # through the interpreter's end
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
for job in jobs:
    finish(job)
print("whole")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("whole\n", "", 0)


def test_the_interpreter_ends_with_jobs_under_way() -> None:
    done = run_script("""
decoder = Decoder(2)
jobs = [long_job(decoder, blank(5000)) for _ in range(4)]
""")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_ctrl_c_ends_a_wait() -> None:
    """The queue would take minutes."""
    done = run_script("""
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
decoder = Decoder(1)
jobs = [long_job(decoder, blank(5000)) for _ in range(4)]
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    finish(jobs[-1])
except KeyboardInterrupt:
    print("interrupted")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_a_missing_library_or_another_version_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = native_decoder.LIBRARY
    for other, reason in (
        (replace(library, path=tmp_path / "none.so"), r"none\.so: cannot open shared object file"),
        (
            replace(library, interface=(library.interface[0], -1)),
            r"built by another version of this package \(interface \d+, not -1\)",
        ),
        (
            replace(library, interface=("no_such_function", 1)),
            r"another version of this package \(interface None, not 1",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(native_decoder, "LIBRARY", other)
            for _ in range(2):
                assert not native_decoder.available()
                with pytest.raises(OSError, match=reason):
                    Decoder(1)
    assert native_decoder.available()


def resident(mapped: mmap.mmap) -> np.ndarray:
    """Which pages of a mapped file are in memory: bool (pages,)."""
    import ctypes

    pages = -(-len(mapped) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), found) == 0
    return np.frombuffer(found, np.uint8) & 1 > 0


@contextlib.contextmanager
def file_on_disk_alone(path: Path, size: int) -> Iterator[mmap.mmap]:
    """Writes a file of random bytes and yields its map, of which no page is in memory. Skips where that cannot be."""
    path.write_bytes(os.urandom(size))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        if resident(mapped).any():
            pytest.skip("this file system keeps its files in memory")
        yield mapped


def test_read_ahead_brings_what_was_asked_into_memory(decoder: Decoder, tmp_path: Path) -> None:
    with file_on_disk_alone(tmp_path / "file", 32 << 20) as mapped:
        base = np.frombuffer(mapped, np.uint8).ctypes.data
        starts = np.array([20 << 20, 5000, 9000, (20 << 20) + 4_000_000], np.uint64)  # one gap is read across
        sizes = np.array([3_000_000, 1, 100, 50], np.int64)
        decoder.read_ahead(starts + np.uint64(base), sizes)
        wanted = np.zeros(len(resident(mapped)), bool)
        for start, length in zip(starts.tolist(), sizes.tolist(), strict=True):
            wanted[start // mmap.PAGESIZE : (start + length - 1) // mmap.PAGESIZE + 1] = True
        assert eventually(lambda: bool(resident(mapped)[wanted].all()))
        assert resident(mapped).mean() < 0.5
    decoder.read_ahead(np.array([8, 1 << 60], np.uint64), np.array([1 << 20, 5], np.int64))  # nobody's: harmless


def stored(path: Path, offset: int = 0, **changes: int) -> tuple[np.ndarray, list[bytes]]:
    """The description of an image in a file, `FILE_DTYPE` (1,), and the names that must be kept alive."""
    names = [bytes(path.parent) + b"\0", os.fsencode(path.name) + b"\0"]
    folder, name = (np.frombuffer(text, np.uint8).ctypes.data for text in names)
    status = path.stat()
    row = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, **changes}
    return np.array([(folder, name, offset, row["size"], row["mtime_ns"])], FILE_DTYPE), names


def decode_stored(decoder: Decoder, files: np.ndarray, nbytes: int, size: tuple[int, int]) -> tuple[Job, np.ndarray]:
    output = np.full((1, 16, 16, 3), 77, np.uint8)
    box, no = np.array([[0, 0, *size]], np.int32), np.zeros(1, np.bool_)
    sizes = np.array([size], np.int32)
    nothing = np.zeros(1, np.uint64)
    job = decoder.submit(nothing, np.array([nbytes], np.int64), sizes, box, no, no, output, files)
    while not job.wait(1000):
        pass
    return job, output


def test_an_image_in_a_file_is_that_in_memory(decoder: Decoder, tmp_path: Path) -> None:
    jpeg = pillow_jpeg(make_image(1, 50, 70))
    for offset in (0, 1, 5000):
        path = tmp_path / f"{offset}.bin"
        path.write_bytes(bytes(offset) + jpeg + b"behind it")
        files, _names = stored(path, offset)
        job, output = decode_stored(decoder, files, len(jpeg), (50, 70))
        assert job.statuses.tolist() == [Status.OK]
        status, _, whole = native_decoder.decode_whole(np.frombuffer(jpeg, np.uint8), 50, 70)
        assert status == Status.OK and abs(output.mean() - whole.mean()) < 3
        decoder.read_ahead(np.zeros(1, np.uint64), np.array([len(jpeg)]), files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 5}, "has changed: {size} bytes instead of 5"),
        ({"mtime_ns": 5}, "has changed: it was written after it was indexed"),
        ({"gone": 1}, "is not there any more"),
        ({"folder": 1}, "is not a file of data any more"),
    ],
)
def test_another_file_is_not_decoded(decoder: Decoder, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(pillow_jpeg(make_image(1, 50, 70)))
    size = path.stat().st_size
    files, _names = stored(path, **{key: value for key, value in changes.items() if key in ("size", "mtime_ns")})
    if "gone" in changes or "folder" in changes:
        path.unlink()
    if "folder" in changes:
        path.mkdir()
    job, output = decode_stored(decoder, files, min(size, int(files["size"][0])), (50, 70))
    assert job.statuses.tolist() == [Status.NO_FILE] and job.message(0) == message.format(size=size)
    assert not output.any()
    decoder.read_ahead(np.zeros(1, np.uint64), np.array([size]), files)  # only a hint


def test_read_ahead_brings_files_into_memory(decoder: Decoder, tmp_path: Path) -> None:
    path, size = tmp_path / "file", 2 << 20
    with file_on_disk_alone(path, size) as mapped:
        files, _names = stored(path)
        decoder.read_ahead(np.zeros(1, np.uint64), np.array([size]), files)
        assert eventually(lambda: bool(resident(mapped).any()))
