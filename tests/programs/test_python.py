"""A Python virtual environment: made, filled from a wheel, used, emptied."""

import sys
import zipfile
from pathlib import Path

import pytest

from .ground import MOSTLY_PASSTHROUGH, Overlay, run

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

WHEEL = {
    "greeting/__init__.py": "def main():\n    print('greetings from', __file__)\n",
    "greeting-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
    "greeting-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "greeting-1.0.dist-info/entry_points.txt": "[console_scripts]\ngreet = greeting:main\n",
    "greeting-1.0.dist-info/RECORD": "",
}


@MOSTLY_PASSTHROUGH
def test_a_virtual_environment_is_made_and_used(overlay: Overlay, tmp_path: Path) -> None:
    wheel = tmp_path / "greeting-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
    home = overlay.path / "venv"
    run(sys.executable, "-m", "venv", home, timeout=120)
    pip = [home / "bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run(*pip, "install", "--quiet", "--no-index", wheel, timeout=60)
    assert run(home / "bin/greet").startswith(f"greetings from {home}/lib/")
    assert list(home.glob("lib/*/site-packages/greeting/__pycache__/*.pyc"))
    run(home / "bin/python", "-m", "compileall", "-q", "-f", home / "lib", timeout=120)
    run(*pip, "check")
    run(*pip, "uninstall", "--quiet", "--yes", "greeting")
    assert not list(home.glob("lib/*/site-packages/greeting*"))
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", home)
    assert run(home / "bin/python", "-c", "import sys; print(sys.prefix)").strip() == str(home)
