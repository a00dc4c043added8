"""Shipped data sets, each composed once; a folder that `datasets` reads as a repository of the hub."""

import dataclasses
from functools import cache

import pytest

from tests.world import compose_request

MODELS = {"facts": "tiny64-facts", "skills": "tiny64-skills", "words": "tiny64-skills"}
MODELS |= {"bandit": "tiny64-knows", "bandit_drawn": "tiny64-knows"}


@cache
def composed(name):
    """Return a run on a shipped data set, with a model that has its symbols."""
    model = [f"model={MODELS[name]}"] if name in MODELS else []
    return compose_request([*model, f"dataset={name}"]).points[0].spec


def shipped(name, /, **changes):
    return dataclasses.replace(composed(name).dataset, **changes)


@pytest.fixture
def hub(tmp_path, offline):
    """`hub(name, rows)` leaves a data set, rows: {configuration: {split: rows}}; returns its path."""
    import datasets
    import yaml

    def made(name, content, described=True):
        configs, infos = [], []
        for config, splits in content.items():
            features = datasets.Dataset.from_list(next(filter(None, splits.values()))).features
            files, counts = [], []
            (tmp_path / name / config).mkdir(parents=True)
            for split, rows in splits.items():
                path = f"{config}/{split}-00000-of-00001.parquet"
                columns = {column: [row[column] for row in rows] for column in features}
                datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / name / path)
                files.append({"split": split, "path": path})
                counts.append({"name": split, "num_examples": len(rows), "num_bytes": 1})
            configs.append({"config_name": config, "data_files": files})
            described_as = {"features": features._to_yaml_list(), "splits": counts}
            infos.append({"config_name": config, **described_as})
        card = {"configs": configs, **({"dataset_info": infos} if described else {})}
        (tmp_path / name / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        return str(tmp_path / name)

    return made
