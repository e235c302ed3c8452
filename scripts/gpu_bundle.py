"""Makes a folder that runs `./dev gpu` on a machine without a network: ./dev gpu-bundle OUT --images FOLDER

    OUT/gpu           the command: OUT/gpu [--minutes N] [--out DIR] [--recipes NAME=OUT/packs/NAME,...]
    OUT/checkout/     this checkout as it is, with the native libraries
    OUT/images/       the images, with sides of at most 500 pixels
    OUT/packs/NAME/   data for accuracy runs: copies of what --pack names. With --pack-parts N: archives
                      NAME-1.tar.xz to NAME-N.tar.xz of its images, each with every N-th image of all classes, so that
                      the parts can be transferred one by one and each is of use without the others
    OUT/site/         packages that the other machine lacks; FFCV where it is installed here
    OUT/libs/         the shared libraries of these
    OUT/dali.tar.xz   DALI with the kernels of one generation of GPUs; unpacked by the first run

The other machine has x86-64 Linux, Python (--python), torch, torchvision, Triton, NumPy, Pillow, rich, timm and pytest.
The native libraries have plain C interfaces, so those that were built here work with another Python.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from strip_fatbin import strip

ROOT: Final = Path(__file__).resolve().parent.parent
SITE: Final = Path(sysconfig.get_path("purelib"))
PACKAGES: Final = ("zlib-ng", "webdataset", "braceexpand")
DALI_NEEDS: Final = ("nvtx", "optree", "libcst", "makefun", "gast", "astunparse")
FFCV: Final = ("ffcv", "assertpy", "terminaltables")
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SYSTEM: Final = re.compile(r"lib(c|m|z|stdc\+\+|gcc_s|dl|rt|pthread)\.so")  # the other machine has its own
MAX_SIDE: Final = 500
COMMAND: Final = """#!/bin/sh
# Checks and measures on this machine, without a network: gpu [--minutes N] [--out DIR] ...; gpu --help
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
python=${PYTHON:-python3}
dali=$here/dali
if [ -f "$here/dali.tar.xz" ] && [ ! -e "$dali/complete" ]; then
    [ -w "$here" ] || dali=$(mktemp -d)/dali
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="fully_trusted")' \\
        "$here/dali.tar.xz" "$dali"
    : >"$dali/complete"
fi
export PYTHONPATH="$here/checkout:$here/site:$dali${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH="$here/libs:$dali/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
case " $* " in
*" --data"* | *" --images"*) ;;
*) set -- --images "$here/images" "$@" ;;
esac
exec "$python" -m sdpnet.gpu_checks "$@"
"""


def copy_checkout(out: Path) -> None:
    """The files that git knows or would add, the native libraries, the commit."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, out / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    for folder in ("pipelines", "preprocess"):
        for library in sorted((ROOT / folder / "native").glob("*.so")):
            shutil.copy2(library, out / folder / "native" / library.name)
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, check=True)
    (out / "COMMIT").write_bytes(commit.stdout)


def _other_name(name: str, python: str) -> str:
    """The file name of a compiled module under another version of Python ("3.12")."""
    return re.sub(r"cpython-3\d+", f"cpython-{python.replace('.', '')}", name)


def copy_images(images: Path, out: Path) -> int:
    """Class folders with JPEGs of at most `MAX_SIDE` pixels a side. Returns their number."""
    count = 0
    for path in sorted(images.glob("*/*")):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
        target = out / path.parent.name / f"{path.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "JPEG", quality=90, subsampling="4:2:0")
        count += 1
    return count


def pack_parts(images: Path, out: Path, parts: int) -> list[Path]:
    """Writes OUT/NAME-1.tar.xz to OUT/NAME-N.tar.xz of a folder with train/CLASS and val/CLASS. Returns their paths.

    Part k has the images k, k + N, ... of each class, so that each part alone is a smaller set with all classes.
    """
    out.mkdir(parents=True)
    paths = [out / f"{images.name}-{part + 1}.tar.xz" for part in range(parts)]
    for part, path in enumerate(paths):
        with tarfile.open(path, "w:xz", preset=6) as archive:
            for folder in sorted(images.glob("*/*")):
                for image in sorted(folder.iterdir())[part::parts]:
                    archive.add(image, image.relative_to(images))
    return paths


def _needed(library: Path) -> list[Path]:
    """The shared libraries that a library is linked with, without the system's."""
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
    found = [Path(match[1]) for match in re.finditer(r"=> (/\S+)", listed)]
    return [path for path in found if not SYSTEM.match(path.name)]


def copy_libraries(libraries: list[Path], out: Path) -> None:
    """What the libraries are linked with."""
    out.mkdir(parents=True, exist_ok=True)
    for path in dict.fromkeys(path for library in libraries for path in _needed(library)):
        shutil.copy2(path, out / path.name)


def copy_ffcv(out: Path, python: str) -> list[Path]:
    """FFCV and the packages that it needs, if it is installed here. Returns its libraries."""
    if not (SITE / "ffcv").is_dir():
        return []
    for name in FFCV:
        shutil.copytree(SITE / name, out / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    libraries = [*SITE.glob("_libffcv*.so"), *(SITE / "ffcv").glob("_libffcv*.so")]
    for library in libraries:
        shutil.copy2(library, out / library.relative_to(SITE).parent / _other_name(library.name, python))
    return libraries


def install_packages(names: tuple[str, ...], out: Path, python: str) -> None:
    """Installs packages for the other Python, without what they need."""
    if names:
        flags = [word for platform in PLATFORMS for word in ("--platform", platform)]
        flags += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-deps", "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(out), *flags, *names]
        subprocess.run(command, check=True)


def copy_dali(out: Path, python: str, capability: int) -> None:
    """Writes OUT/dali.tar.xz: DALI as it is installed here, with the kernels of one compute capability."""
    own = f"cpython-{python.replace('.', '')}-"
    with tempfile.TemporaryDirectory() as work:
        nvidia = Path(work, "nvidia")

        def unneeded(folder: str, names: list[str]) -> set[str]:
            others = {name for name in names if "cpython-3" in name and own not in name}
            return others | {name for name in names if name in ("include", "__pycache__") or name.endswith(".pyi")}

        shutil.copytree(SITE / "nvidia/dali", nvidia / "dali", ignore=unneeded)
        codec = SITE / "nvidia/nvimgcodec"
        files = [codec / "__init__.py", codec / "libnvimgcodec.so.0", *codec.glob(f"*{own}*.so")]
        files += [*codec.glob("extensions/libnvjpeg_ext.so*"), *codec.glob("extensions/libjpeg_turbo_ext.so*")]
        files.append(SITE / "nvidia/cu13/lib/libnvjpeg.so.13")
        for file in files:
            target = nvidia / file.relative_to(SITE / "nvidia")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        shutil.copytree(codec / "tools", nvidia / "nvimgcodec/tools", ignore=unneeded)
        # With torch's own packages, which also lie in folders `nvidia`, this makes one package of both.
        (nvidia / "__init__.py").write_text("import pkgutil; __path__ = pkgutil.extend_path(__path__, __name__)\n")
        for library in sorted(path for path in nvidia.rglob("*.so*") if path.is_file()):
            data = bytearray(library.read_bytes())
            if strip(data, {capability})[1]:
                library.write_bytes(data)
        install_packages(DALI_NEEDS, Path(work), python)
        with tarfile.open(out / "dali.tar.xz", "w:xz", preset=8) as archive:
            for path in sorted(Path(work).iterdir()):
                archive.add(path, path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--images", type=Path, required=True, metavar="FOLDER", help="class folders of images, such as 500 of ImageNet")
    add("--pack", action="append", default=[], type=Path, metavar="PATH", help="shard set or images for accuracy runs")
    add("--pack-parts", type=int, default=0, metavar="N", help="packs of images as N archives each, for N transfers")
    add("--python", default="3.12", metavar="3.N", help="Python of the other machine (default: %(default)s)")
    add("--capability", type=int, default=90, metavar="NN", help="of its GPU, for DALI (default: %(default)s, an H100)")
    add("--package", action="append", default=[], metavar="NAME", help=f"also install it; by default {PACKAGES}")
    add("--no-packages", action="store_true", help="install none: needs no network")
    add("--no-dali", action="store_true", help="leave DALI out")
    arguments = parser.parse_args()
    out = arguments.out
    if out.exists():
        parser.error(f"{out}: exists already; remove it, or give another folder")
    if not list(arguments.images.glob("*/*")):
        parser.error(f"--images {arguments.images}: has no images in class folders")
    out.mkdir(parents=True)
    copy_checkout(out / "checkout")
    print(f"{copy_images(arguments.images, out / 'images'):,} images")
    for pack in arguments.pack:
        if arguments.pack_parts and not (pack / "manifest.json").is_file():
            for path in pack_parts(pack, out / "packs" / pack.name, arguments.pack_parts):
                print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
        else:
            shutil.copytree(pack, out / "packs" / pack.name)
    (out / "site").mkdir()
    libraries = [path for folder in ("pipelines", "preprocess") for path in (ROOT / folder / "native").glob("*.so")]
    copy_libraries([*libraries, *copy_ffcv(out / "site", arguments.python)], out / "libs")
    if not arguments.no_packages:
        install_packages((*PACKAGES, *arguments.package), out / "site", arguments.python)
    if not arguments.no_dali and (SITE / "nvidia/dali").is_dir():
        copy_dali(out, arguments.python, arguments.capability)
    (out / "gpu").write_text(COMMAND)
    (out / "gpu").chmod(0o755)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{out}: {size / 1e6:,.0f} MB; on the other machine: {out.name}/gpu --minutes 10 --out DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
