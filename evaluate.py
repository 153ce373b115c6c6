"""Measure edited videos, and write a report that shows them beside their source.

    python evaluate.py --edits tokenflow-results/pnp_wolf tokenflow-results/pnp_wolf_2
    python evaluate.py --source wolf.mp4 --edited edited-by-another-program.mp4

Each edit's folder gets a report.html, to be opened in a browser, and report/figures.json.
The last line on stdout is the path of the report; of several edits, of the one over all.
"""

from tokenflow.cli import command, parse
from tokenflow.config_evaluate import EvaluateConfig


@command
def main() -> str:
    """Parse, measure, write, and return where the report is."""
    config = parse(EvaluateConfig, __doc__, "config_evaluate.yaml")

    # Slow imports, after the configuration is known to be valid.
    from tokenflow.editing.subjects import find_subjects
    from tokenflow.evaluation.evaluate import evaluate

    return str(evaluate(config, find_subjects(config)))


if __name__ == "__main__":
    main()
