from pathlib import Path

from setuptools import setup

setup(
    name="fastdpo",
    version="0.1.0",
    description="The fastest and leanest loss for preference tuning of language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ holds packages of fastdpo without being one itself: a package called `kernels` at the repository's root
    # would shadow the PyPI package of that name
    package_dir={"fastdpo": "fastdpo", "fastdpo.gpu": "kernels/gpu", "fastdpo.cpu": "kernels/cpu"},
    packages=[
        *("fastdpo", "fastdpo.bench", "fastdpo.cache", "fastdpo.gpu", "fastdpo.cpu", "fastdpo.losses", "fastdpo.study"),
        *("fastdpo.integrations", "fastdpo.integrations.liger", "fastdpo.integrations.transformers"),
        "fastdpo.integrations.trl_packing",
    ],
    package_data={
        "fastdpo": ["py.typed"],
        "fastdpo.cpu": ["*.cpp", "*.h"],
        "fastdpo.study": ["token_page.*"],
    },
    install_requires=["torch>=2.8", "ninja", "numpy"],
    extras_require={
        "triton": ["triton>=3.4"],
        "trl": [
            *("trl==1.16.0", "transformers", "peft", "matplotlib", "pyarrow>=16", "pyyaml", "safetensors", "tqdm"),
            "psutil",
        ],
    },
    entry_points={"console_scripts": ["fastdpo = fastdpo.cli:main"]},
)
