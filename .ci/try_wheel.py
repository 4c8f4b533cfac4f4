"""Install the wheel of a folder into a fresh environment, and run the README's code there, away from the sources.

``python .ci/try_wheel.py dist``: what it depends on, torch among it, is that of the Python that runs this.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

_WHERE = "\nimport ggn_ntk\nprint(ggn_ntk.__version__, ggn_ntk.__file__)\n"


def main(dist: Path) -> None:
    """Try the wheel.

    Args:
        dist: The folder.
    """
    (wheel,) = dist.resolve().glob("*.whl")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        packages = Path(folder, "lib", f"python{sysconfig.get_python_version()}", "site-packages")
        # What a .pth file of the other environment adds, such as an editable ggn_ntk, is not added through this one.
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
        subprocess.run([*install, wheel], check=True)
        Path(folder, "readme.py").write_text(code + _WHERE)
        ran = subprocess.run([python, "readme.py"], cwd=folder, check=True, capture_output=True, text=True)
        version, file = ran.stdout.split()
        if not Path(file).resolve().is_relative_to(Path(folder).resolve()):
            sys.exit(f"ggn_ntk was not imported from the wheel, but from {file}")
        print(f"{wheel.name}: the README runs, with ggn_ntk {version}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
