"""Packaging of gmta: the core as `gmta`, the bundled plugins (folder plugins/) as `gmta_plugins`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "gmta/__init__.py").read_text()).group(1)

PARTS = sorted(f"gmta.{path.parent.name}" for path in (HERE / "gmta").glob("*/__init__.py"))
BUNDLED = sorted(path.stem for path in (HERE / "plugins").glob("*.py") if path.stem != "__init__")

setup(
    name="gmta",
    version=VERSION,
    description="A production mail transfer agent in Python: gevent workers, a durable queue, plugins for all policy",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["gmta", *PARTS, "gmta_plugins"],
    package_dir={"gmta": "gmta", "gmta_plugins": "plugins"},
    package_data={"gmta": ["py.typed"]},
    install_requires=[
        "gevent>=24.2", "dnspython>=2.6", "pluggy>=1.5", "dkimpy>=1.1.8", "pyspf>=2.0.14", "pydantic>=2.7",
        "click>=8.1", "rich>=13.7", "cryptography>=42", "idna>=3.7", "prometheus-client>=0.20", "argon2-cffi>=23.1", "urllib3>=2.2",
    ],
    extras_require={
        "postgresql": ["psycopg[binary]>=3.2"],
        "ldap": ["ldap3>=2.9"],
        "test": ["ldap3>=2.9", "pytest>=8", "hypothesis>=6.100", "import-linter>=2", "ruff>=0.6", "mypy>=1.11", "pyyaml>=6",
                 "dkimpy[ARC,ed25519]>=1.1.8", "jsonschema>=4.20", "standardwebhooks>=1.0", "acme>=5", "josepy>=2",
                 "psycopg[binary]>=3.2"],
        "acme": ["acme>=5", "josepy>=2"],
    },
    entry_points={
        "console_scripts": ["gmta = gmta.cli:main", *(f"{name} = gmta.cli.sendmail:main" for name in ("sendmail", "mailq", "newaliases"))],
        "gmta.plugins": [f"{name} = gmta_plugins.{name}" for name in BUNDLED],
    },
)
