"""The arguments that every benchmark takes."""

import argparse
from pathlib import Path


def benchmark_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the report's place (`output` by default), the checkpoint and where it runs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="where the report goes")
    parser.add_argument("--model", type=Path, default=Path("data/shapes-sd"), help="checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return parser
