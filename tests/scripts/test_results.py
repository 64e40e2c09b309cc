"""utils/results.py: a result is reused where it is the same, refused with what differs, made where it has to be."""

import dataclasses

import pytest
import torch
from torch import nn

from utils.results import find_result, load_state, result_path, save_state
from utils.script import UserError, save_json
from utils.settings import Data, Model, Run
from utils.tensor_files import FORMAT_VERSION, save_tensors

IDENTITY = {
    "config": {"dtype": "float32", "seed": 0, "fractions": [0.5, 1.0]},
    "fingerprint": "rows",
    "model_fingerprint": "weights",
}


def changed(part: str, **values) -> dict:
    return IDENTITY | {part: {**IDENTITY[part], **values} if part == "config" else values["value"]}


@pytest.fixture(params=["result.json", "result.safetensors"])
def path(request, tmp_path):
    """A finished result of either kind."""
    path, content = tmp_path / request.param, {**IDENTITY, "environment": "elsewhere", "score": 0.25}
    if path.suffix == ".json":
        save_json(path, content)
    else:
        save_tensors(path, {"a": torch.ones(2)}, {**content, "format_version": FORMAT_VERSION})
    return path


def test_the_same_result_is_reused_and_given_back(path):
    found = find_result(path, IDENTITY, Run())
    assert found is not None and found["score"] == 0.25


def test_a_result_is_made_where_there_is_none_and_where_it_is_asked_for_again(path):
    assert find_result(path.with_name("other.json"), IDENTITY, Run()) is None
    assert find_result(path, IDENTITY, Run(overwrite=True)) is None
    path.write_text("damaged")
    assert find_result(path, IDENTITY, Run(overwrite=True)) is None
    with pytest.raises(UserError, match=path.name):
        find_result(path, IDENTITY, Run())


def test_every_setting_that_differs_is_named_and_no_other(path):
    with pytest.raises(UserError) as raised:
        find_result(path, changed("config", dtype="bfloat16", fractions=[0.5], new=True), Run())
    message = str(raised.value)
    assert message.startswith(f"{path} was made with other settings")
    assert "dtype: 'float32' there, 'bfloat16' now" in message
    assert "fractions: [0.5, 1.0] there, [0.5] now" in message
    assert "new: None there, True now" in message
    assert "seed" not in message and "--overwrite" in message and "--results_dir" in message


def test_settings_that_may_differ_do_not_hide_those_that_may_not(path):
    other = changed("config", dtype="bfloat16", seed=1)
    assert find_result(path, other, Run(), free={"dtype", "seed"}) is not None
    with pytest.raises(UserError, match=r"settings \(seed: 0 there, 1 now\)"):
        find_result(path, other, Run(), free={"dtype"})


@pytest.mark.parametrize(
    ("part", "words"), [("fingerprint", "from other rows"), ("model_fingerprint", "with other weights of the model")]
)
def test_other_rows_and_other_weights_are_told_apart(path, part, words):
    with pytest.raises(UserError, match=f"{words}.*--overwrite"):
        find_result(path, changed(part, value="others"), Run())


def test_places_tell_models_adapters_and_datasets_apart(tmp_path):
    rows = tmp_path / "my.rows.jsonl"
    rows.touch()
    run, model = Run(results_dir=tmp_path), Model("Qwen/Qwen2-0.5B")
    adapted = dataclasses.replace(model, adapter_dir=tmp_path)
    assert result_path("ntps", run, model, Data("emotion"), ".json") == tmp_path / "ntps/Qwen__Qwen2-0.5B/emotion.json"
    assert result_path("ntps", run, adapted, Data(str(rows))) == tmp_path / "ntps/Qwen__Qwen2-0.5B+lora/my.rows"


def test_a_state_comes_back_whole_and_only_to_its_own_run(tmp_path):
    torch.manual_seed(0)

    def start():
        layer = nn.Linear(3, 2)
        return layer, dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        layer(torch.arange(3.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    path = tmp_path / "state.safetensors"
    layer, parameters, optimizer = start()
    step(layer, optimizer)
    save_state(path, parameters, optimizer, IDENTITY, {"epoch": 3})
    step(layer, optimizer)
    resumed, its_parameters, its_optimizer = start()
    assert load_state(tmp_path / "none.safetensors", its_parameters, its_optimizer, IDENTITY) is None
    with pytest.raises(UserError, match="other weights of the model"):
        load_state(path, its_parameters, its_optimizer, changed("model_fingerprint", value="others"))
    progress = load_state(path, its_parameters, its_optimizer, IDENTITY)
    assert progress is not None and progress["epoch"] == 3
    step(resumed, its_optimizer)
    assert torch.equal(resumed.weight, layer.weight) and torch.equal(resumed.bias, layer.bias)
