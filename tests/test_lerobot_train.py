"""The unmodified LeRobot with the alignment in its loss: datasets on disk, the commands a user types, checkpoints, resuming, ranks.

Marked `lerobot`: `make lerobot` sets an environment up that has it, and runs these. Configurations are checked wherever YAML is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

Having = types.SimpleNamespace
ROOT = Path(__file__).parents[1]
FRAMES, SIM, REAL = 16, 5, 3
CAMERAS = ("observation.images.front", "observation.images.side")
STATE, CAMERA = "observation.state", CAMERAS[0]
TRAIN = shlex.split(
    "--policy.device=cpu --policy.push_to_hub=false --policy.pretrained_backbone_weights=null --batch_size=8 --num_workers=0 --steps=20 "
    "--log_freq=5 --save_freq=10 --wandb.enable=false --seed=1 --policy.optimizer_lr=3e-4"
)
ACT = shlex.split(
    "--policy.type=act --policy.dim_model=32 --policy.n_heads=2 --policy.dim_feedforward=64 --policy.n_encoder_layers=1 "
    "--policy.use_vae=false --policy.chunk_size=4 --policy.n_action_steps=4 --policy.optimizer_lr_backbone=1e-4"
)
DIFFUSION = shlex.split(
    "--policy.type=diffusion --policy.horizon=8 --policy.n_action_steps=4 --policy.down_dims=[16,32] --policy.crop_shape=null "
    "--policy.spatial_softmax_num_keypoints=8 --policy.num_train_timesteps=10 --policy.diffusion_step_embed_dim=16 "
    "--policy.scheduler_warmup_steps=0"
)


def features(camera="observation.images.front", **more):
    image = dict(src_key=camera, use_learned_embed=True, weight_embed=0.1, weight_label=0, term_name="image")
    state = dict(src_key="observation.state", weight_label=0.5, term_name="state")
    return dict(reg=0.1, tau_src=1.0, tau_tgt=1.0, cost_scale="mean", features=[image, state]) | more


#: The joints that the wide robot and the other have in common.
SLICED = dict(src_key="observation.state", dim_slice=[0, 8])


@pytest.mark.parametrize("name", ["act_state", "act_three_cameras", "diffusion_observation", "released"])
def test_the_configurations_are_valid(name):
    pytest.importorskip("yaml")
    from gpu_ot.lerobot import OTConfig

    cfg = OTConfig.from_file(ROOT / "configs" / "lerobot" / f"{name}.yaml")
    assert cfg.loss_config.features and cfg.pair_info_path and 0 < cfg.lambda_ot <= 1
    assert OTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    if name == "act_three_cameras":
        assert math.isclose(sum(spec.weight_embed for spec in cfg.loss_config.features), 1, abs_tol=1e-3)
    if name == "released":
        assert cfg.loss_config.reference == "diagonal" and cfg.pairs_of(8) == 128


def test_training_without_lerobot_says_how_to_get_it(tmp_path):
    blocked = "import sys; sys.modules['lerobot'] = None; from gpu_ot.cli import main; sys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "pip install lerobot" in done.stderr


def test_a_source_with_names_of_its_own(monkeypatch, tmp_path):
    """It is read as the target is, its features take the target's names, and a checkpoint keeps its own to find it again."""
    from gpu_ot.lerobot import OTConfig
    from gpu_ot.lerobot import train as launcher

    opened = {}
    datasets = Having(
        LeRobotDataset=lambda name, **options: opened.update(options),
        LeRobotDatasetMetadata=lambda name, root: Having(features={"observation.images.cam": {}, STATE: {}}),
    )
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", datasets)
    monkeypatch.setitem(sys.modules, "lerobot.datasets.factory", Having(resolve_delta_timestamps=lambda policy, meta: None))
    pairs = Having(target=Having(episodes=np.arange(3)))
    monkeypatch.setattr(launcher, "read_pairs", lambda path, **bases: pairs)
    monkeypatch.setattr(launcher, "LeRobotOTPairDataset", lambda *data, **options: None)
    loss = features("observation.images.cam")
    loss["features"][0] |= dict(tgt_key="observation.images.front", term_name=None)
    given = OTConfig.from_dict(dict(src_repo_id="sim", pair_info_path="pairs.npz", loss_config=loss))
    before = given.to_dict()

    launch = launcher._Launch(given, types.ModuleType("script"))
    target = Having(image_transforms=None, meta=Having(features={"observation.images.front": {}, STATE: {}}))
    script = Having(
        resume=False, policy=Having(pretrained_path="hub"), tolerance_s=1e-4, dataset=Having(video_backend="pyav"), seed=1,
        rename_map={"observation.state": "observation.joints"},
    )  # fmt: skip
    launch._dataset(lambda cfg: target, script)
    assert opened["video_backend"] == "pyav"
    first = launch.cfg.loss_config.features[0]
    assert (first.src_key, first.name) == ("observation.images.front", "observation.images.cam")
    state = launch.cfg.loss_config.features[1]  # after the preprocessor, which follows --rename_map
    assert (state.src_key, state.tgt_key, state.name) == ("observation.joints", "observation.joints", "state")
    named = {key: launch._renamed(key) for key in ("observation.images.cam_is_pad", "observation.images.cam", "observation.state", "task")}
    assert list(named.values()) == ["observation.images.front_is_pad", "observation.images.front", "observation.state", "task"]

    launch.training = Having(state_dict=lambda: {"step": 3})
    launch._save(lambda **options: None, checkpoint_dir=tmp_path)
    assert OTConfig.from_file(tmp_path / "training_state" / "ot_config.json").to_dict() == before


@pytest.fixture(scope="module")
def home(lerobot, tmp_path_factory):
    """A folder with a simulated and a real dataset, and the pairs of the command line."""
    home = tmp_path_factory.mktemp("lerobot")
    made = run(home, "python", "-c", f"import runpy; runpy.run_path({__file__!r})['record']()")
    assert (home / "real" / "meta" / "info.json").exists(), made
    (home / "configs").symlink_to(ROOT / "configs")
    assert "wrote pairs.npz" in run(home, *printed("pair "))
    return home


def printed(begin: str) -> list[str]:
    """The first command of the page on robots that begins so, without its comment."""
    lines = (ROOT / "docs" / "robots.md").read_text().splitlines()
    return shlex.split(next(line for line in lines if line.startswith(f"gpu-ot {begin}")), comments=True)


def record() -> None:
    """In the current folder: movements, as a state and as a square that moves on a ground of each domain's own colour, seen by two cameras
    whose videos hold several episodes each. `wide` is `sim` with a ninth joint."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    for name, episodes, seed, ground in (("sim", SIM, 0, (30, 60, 90)), ("real", REAL, 1, (90, 60, 30)), ("wide", SIM, 0, (30, 60, 90))):
        rng = np.random.default_rng(seed)
        joints, ninth = (dict(dtype="float32", shape=(n,), names=list("abcdefghi"[:n])) for n in (8, 9))
        wide = ninth if name == "wide" else joints
        video = dict(dtype="video", shape=(3, 64, 64), names=["channel", "height", "width"])
        columns = {"observation.state": wide, "action": joints} | ({} if name == "wide" else dict.fromkeys(CAMERAS, video))
        dataset = LeRobotDataset.create(name, fps=10, features=columns, root=Path(name), use_videos=True)
        for _ in range(episodes):
            phase = rng.random(8) * 2 * np.pi
            for t in range(FRAMES):
                state = np.sin(phase + 4.4 * t / FRAMES).astype(np.float32)
                picture = np.full((64, 64, 3), ground, np.uint8)
                row, column = ((state[:2] + 1) * 28).astype(int)
                picture[row : row + 8, column : column + 8] = 255
                seen = {} if name == "wide" else dict(zip(CAMERAS, (picture, 255 - picture.swapaxes(0, 1)), strict=True))
                frame = {"observation.state": np.resize(state, wide["shape"]), "action": np.roll(state, 1), "task": "move"}
                dataset.add_frame(frame | seen)
            dataset.save_episode()
        dataset.finalize()


def run(home: Path, *command: str, ok: bool = True) -> str:
    """What a command says, in an environment without a network and on one core."""
    program = Path(sys.executable).with_name(command[0])
    environment = os.environ | {
        "HF_HOME": str(home / "hf"), "HF_LEROBOT_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"
    }  # fmt: skip
    done = subprocess.run([str(program), *command[1:]], cwd=home, env=environment, capture_output=True, text=True, timeout=1800)
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def write(home: Path, name: str, **given) -> str:
    cfg = dict(src_repo_id="sim", src_root="sim", pair_info_path="pairs.npz", batch_ratio=1.0, window_size=2, lambda_ot=0.1) | given
    (home / name).write_text(json.dumps(cfg))
    return name


def train(home, cfg, out, *arguments, command=("gpu-ot", "train"), ok=True):
    data = ("--dataset.repo_id=real", "--dataset.root=real", f"--output_dir={out}")
    return run(home, *command, "--ot-config", cfg, "--", *data, *TRAIN, *arguments, ok=ok)


def reported(said: str, name: str) -> list[float]:
    """A metric's values in the log, step by step."""
    return [float(value) for value in re.findall(rf"ot step:\d+ .*?\b{name}:(\S+)", said)]


def behaved(said: str) -> list[float]:
    """LeRobot's own losses, the total."""
    return [float(value) for value in re.findall(r"step:\d+ smpl:\S+ ep:\S+ epch:\S+ loss:(\S+)", said)]


@pytest.mark.lerobot
def test_act_learns_saves_and_resumes_the_same_sequence(home):
    changes = dict(bc_src_weight=0.5, plan_every=20, grad_norms_every=5, retrieval_every=10, warmup_steps=10)
    cfg = write(home, "act.json", **changes, loss_config=features("observation.images.*"))
    said = train(home, cfg, "act", *ACT)
    losses, ot, pull = behaved(said), reported(said, "ot_loss"), reported(said, "ot_grad_norm")
    assert len(losses) == len(ot) == len(pull) == 4 and all(map(math.isfinite, losses + ot))
    assert losses[-1] < losses[0]
    assert min(pull) > 0  # the term reaches the encoder
    assert reported(said, "ot_pi_sum")[0] > 0.1 and reported(said, "ot_pi_diag") and "ot_share/state" in said
    assert "ot_cost/image/front" in said and "ot_cost/image/side" in said
    assert reported(said, "lambda_ot") == [0.05, 0.1, 0.1, 0.1]  # the warm-up
    for weighted, loss, weight in zip(reported(said, "ot_loss_weighted"), ot, reported(said, "lambda_ot"), strict=True):
        assert math.isclose(weighted, loss * weight, rel_tol=2e-3)
    assert not re.search(r"ot step:.* loss:", said)
    assert len(top1 := reported(said, "ot_retrieval_top1")) == 2 and all(0 <= share <= 1 for share in top1)
    assert (home / "act" / "ot_plans" / "000020.png").stat().st_size > 5000

    # From the checkpoint of step 10, without naming the configuration again.
    saved = home / "act" / "checkpoints" / "000010"
    assert json.loads((saved / "training_state" / "ot_state.json").read_text())["step"] == 10
    resume = ("--", f"--config_path={saved / 'pretrained_model' / 'train_config.json'}", "--resume=true")
    again = run(home, "gpu-ot", "train", *resume)
    assert behaved(again) == losses[2:] and reported(again, "ot_loss") == ot[2:]

    # With other settings: those of the loss are told, those of the draws are refused, unless they are to begin anew.
    refused = run(home, "gpu-ot", "train", "--ot.window_size=3", *resume, ok=False)
    assert "window_size 2 -> 3" in refused and refused.splitlines()[-1].startswith("gpu-ot: the saved draws follow")
    other = run(home, "gpu-ot", "train", "--ot.lambda_ot=0.2", "--ot.window_size=3", "--restart-pairs", *resume)
    assert "lambda_ot 0.1 -> 0.2" in other and "begin anew" in other
    assert reported(other, "lambda_ot") == [0.2, 0.2] and reported(other, "ot_loss") != ot[2:]

    # The checkpoint is LeRobot's own: it loads where this package does not exist.
    load = (
        "import sys; sys.modules['gpu_ot'] = None; from lerobot.policies.act.modeling_act import ACTPolicy; "
        f"policy = ACTPolicy.from_pretrained({str(saved / 'pretrained_model')!r}); print(type(policy).__mro__[1].__name__, policy.name)"
    )
    assert "PreTrainedPolicy act" in run(home, "python", "-c", load)


@pytest.mark.lerobot
def test_check_tells_what_would_be_aligned_and_trains_nothing(home):
    cfg = write(home, "check.json", loss_config=features("observation.images.*", cost_scale="none"))
    said = train(home, cfg, "checked", *ACT, command=("gpu-ot", "check", "--ot.reg=0.2"))
    assert not (home / "checked").exists() and "step:" not in said
    for role, episodes in (("source sim", SIM), ("target real", REAL)):
        assert f"{role}: {episodes} episodes, {episodes * FRAMES} frames, 10 a second" in said
    assert re.search(r"observation.images.side +video +3x64x64", said)
    side = "observation.images.side"
    assert re.search(rf"image/side +{side} +{side} +embed 0.1 +act's encoder of {side}", said)
    assert re.search(r"state +observation.state .*label 0.5 +nothing: a label", said)
    assert f"{REAL} target episodes, each with {SIM} of {SIM} source episodes" in said
    costs = {name: float(value) for name, value in re.findall(r"^  (image/front|image/side|state) +(\S+) +\S+% ", said, re.M)}
    assert len(costs) == 3 and min(costs.values()) > 0
    numbers = {name: float(value) for name, value in re.findall(r"^  (\w+): (\S+)", said, re.M)}
    assert 0 < numbers["ot_pi_diag"] < numbers["ot_pi_sum"] <= 1 and numbers["cutoff"] > 0
    # What is suggested keeps the plan's mass.
    taus = (f"--ot.{name}={numbers[name]}" for name in ("reg", "tau_src", "tau_tgt"))
    again = train(home, cfg, "checked", *ACT, command=("gpu-ot", "check", *taus))
    assert float(re.search(r"ot_pi_sum: (\S+)", again)[1]) > 0.3


@pytest.mark.lerobot
def test_the_pages_loop_trains_on_frames_of_videos(home, monkeypatch):
    """The frames that were drawn, of both cameras, out of files that hold several episodes each; and the loop on the page about robots."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from gpu_ot.lerobot import LeRobotOTPairDataset

    monkeypatch.chdir(home)
    sim, real = (LeRobotDataset(name, root=home / name) for name in ("sim", "real"))
    assert len(list((home / "sim").rglob("*.mp4"))) == len(CAMERAS) and sim.num_episodes == SIM
    data = LeRobotOTPairDataset(sim, real, "pairs.npz")
    for n in range(0, len(data), 7):
        for side in data[n].values():
            row, column = ((side["obs"][STATE][:2] + 1) * 28 + 4).int().tolist()  # of the square, turned and dark for the second camera
            light, dark = side["obs"][CAMERAS[0]][:, row, column], side["obs"][CAMERAS[1]][:, column, row]
            assert light.min() > 0.7 and dark.max() < 0.3
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "robots.md").read_text(), re.M | re.S)
    exec(next(code for code in blocks if "def train(policy" in code), shown := {})
    policy = built("act", 8, size=64, dim_model=32, n_heads=2, dim_feedforward=64, pretrained_backbone_weights=None).train()
    weight = policy.model.encoder_robot_state_input_proj.weight
    before = weight.detach().clone()
    metrics = shown["train"](policy, torch.optim.SGD(policy.parameters(), 0.1), sim, real, "pairs.npz")
    assert metrics["ot_loss"] > 0 and metrics["ot_pi_sum"] > 0.1 and not torch.equal(weight, before)


@pytest.mark.lerobot
def test_what_the_page_prints_runs(home):
    """Beside what makes the policy small, and no weights wanted."""
    small = [word for word in (*TRAIN, *ACT) if not word.startswith(("--policy.type", "--policy.push"))] + ["--steps=2", "--log_freq=1"]
    assert "numbers to begin with" in run(home, *printed("check "), *small)
    begin, rest = printed("train ")[:4], printed("train ")[4:]
    assert len(reported(run(home, *begin, "--ot.features.0.weight_embed=1", *rest, *small), "ot_loss")) == 2
    assert "wrote pairs.png" in run(home, *printed("pairs "))


@pytest.mark.lerobot
def test_diffusion_aligns_its_whole_observation(home):
    cfg = write(home, "diffusion.json", grad_norms_every=5, loss_config=features("observation"))
    # Predicting the movement itself is learnt in a few steps, and means of five steps tell, though each step has noise of its own.
    said = train(home, cfg, "diffusion", *DIFFUSION, "--policy.prediction_type=sample", "--policy.optimizer_lr=1e-3", "--log_freq=1")
    losses = behaved(said)
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert min(reported(said, "ot_grad_norm")) > 0 and min(reported(said, "ot_cost/image")) > 0


@pytest.mark.lerobot
def test_two_ranks_draw_pairs_of_their_own(home):
    spy = home / "spy.py"
    spy.write_text(
        "import os, sys\n"
        "import gpu_ot.lerobot.attach as attach\n"
        "original = attach.CoTraining.seen\n"
        "def told(self, policy, pair):\n"
        "    source, target = original(self, policy, pair)\n"
        "    values = [round(float(z), 4) for z in target['observation.state'][:, 0]]\n"
        "    with open(f'drawn{os.environ[\"RANK\"]}.txt', 'a') as file:\n"
        "        print(values, file=file)\n"
        "    return source, target\n"
        "attach.CoTraining.seen = told\n"
        "from gpu_ot.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    cfg = write(home, "ranks.json", gather=True, loss_config=features())
    launch = ("torchrun", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "spy.py")
    said = train(home, cfg, "ranks", *ACT, "--steps=4", "--log_freq=2", command=launch)
    drawn = [(home / f"drawn{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 4 and not set(drawn[0]) & set(drawn[1])
    assert all(map(math.isfinite, behaved(said))) and len(reported(said, "ot_loss")) == 2


@pytest.mark.lerobot
def test_bfloat16_trains_with_costs_in_float32(home, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    cfg = write(home, "bf16.json", loss_config=features())
    said = train(home, cfg, "bf16", *ACT, "--steps=4", "--log_freq=2")
    assert all(map(math.isfinite, behaved(said) + reported(said, "ot_loss"))) and max(reported(said, "ot_marginal_error")) < 1e-4


@pytest.mark.lerobot
@pytest.mark.parametrize("change, said", [
    (dict(pair_info_path=None), "pair_info_path is missing"),
    (dict(pair_info_path="nowhere.npz"), "nowhere.npz"),
    (dict(pair_info_path="damaged.npz"), "damaged.npz is no pair file, or a damaged one"),
    (dict(loss_config=features("observation.images.top")), "observation.images.top"),
    (dict(loss_config=features("observation.images.t*")), "which has action, episode_index"),
    (dict(lamda_ot=1.0), 'did you mean "lambda_ot"'),
    (dict(src_repo_id="wide", src_root="wide", pair_info_path="wide.npz", loss_config=dict(features=[SLICED])), "(9,) in the source"),
    (dict(pair_info_path="wide.npz"), "labels have other values"),
    (dict(loss_config=dict(features=[SLICED | dict(dim_slice=[0, 9])])), "dim_slice [0, 9]"),
    (dict(retrieval_every=5, held_out_episodes=3), "none is left to align"),
])  # fmt: skip
def test_mistakes_end_before_the_policy_is_built(home, capfd, monkeypatch, change, said):
    from lerobot.scripts import lerobot_train

    from gpu_ot import cli

    monkeypatch.chdir(home)
    monkeypatch.setattr(lerobot_train, "init_logging", lambda *args, **options: None)
    monkeypatch.setattr(lerobot_train, "make_policy", lambda *args, **options: pytest.fail("the policy is built"))
    data = (home / "pairs.npz").read_bytes()
    (home / "damaged.npz").write_bytes(data[: len(data) // 2])
    if not (home / "wide.npz").exists():  # the first eight are what both have
        assert cli.main(["pair", "--src", "wide", "--tgt", "real", "--out", "wide.npz", "--slice", "0", "8"]) == 0
    cfg = write(home, "wrong.json", **(dict(loss_config=features()) | change))
    arguments = ["--dataset.repo_id=real", "--dataset.root=real", "--output_dir=wrong", *TRAIN, *ACT]
    assert cli.main(["train", "--ot-config", cfg, "--", *arguments]) == 2
    assert said in capfd.readouterr().err


def built(kind, joints=4, size=84, **options):
    """One of LeRobot's policies, tiny, without weights."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config

    config = make_policy_config(kind, device="cpu", push_to_hub=False, **options)
    shapes = {STATE: (FeatureType.STATE, (joints,)), CAMERA: (FeatureType.VISUAL, (3, size, size))}
    config.input_features = {key: PolicyFeature(type=what, shape=shape) for key, (what, shape) in shapes.items()}
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(joints,))}
    torch.manual_seed(0)
    return get_policy_class(kind)(config).eval()


def embeds(policy, observation, keys):
    """Each feature with a gradient, and row by row."""
    from gpu_ot.lerobot.encoders import embed

    flipped = {name: each.flip(0) for name, each in observation.items()}
    for key in keys:
        x = observation[STATE if key == "observation" else key]
        z = embed(policy, key, x, observation)
        assert z.shape[0] == 3 and z.ndim == 2 and z.requires_grad and z.isfinite().all()
        pulls = torch.autograd.grad(z.square().sum(), [p for p in policy.parameters() if p.requires_grad], allow_unused=True)
        assert any(g is not None and bool((g != 0).any()) for g in pulls)
        torch.testing.assert_close(embed(policy, key, x.flip(0), flipped), z.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.lerobot
@pytest.mark.parametrize("kind", ["act", "diffusion", "vqbet", "tdmpc"])
def test_the_registry_finds_the_encoders_of_real_policies(lerobot, kind):
    from gpu_ot import ProblemError
    from gpu_ot.lerobot.encoders import embed

    resnet, crop = dict(pretrained_backbone_weights=None), (84, 84)
    small = {
        "act": dict(dim_model=32, n_heads=2, dim_feedforward=64, **resnet),
        "diffusion": dict(down_dims=(16, 32), horizon=8, n_action_steps=4, crop_shape=None, **resnet),
        "vqbet": dict(crop_shape=crop, gpt_n_layer=1, gpt_n_head=1, **resnet),
        "tdmpc": {},
    }[kind]
    policy = built(kind, **small)
    steps = (2,) if kind == "diffusion" else (policy.config.n_obs_steps,) if kind == "vqbet" else ()
    observation = {STATE: torch.randn(3, *steps, 4), CAMERA: torch.rand(3, *steps, 3, 84, 84)}
    whole = ["observation"] if kind in ("diffusion", "tdmpc") else []
    embeds(policy, observation, [*whole, *([] if kind == "diffusion" else [STATE]), CAMERA])
    with pytest.raises(ProblemError, match=r"no embedding of|has no part"):
        embed(policy, "observation.environment_state", observation[STATE], observation)


def shrunk(kind, monkeypatch):
    """A large policy of LeRobot 0.6 at a size that a test can hold: the classes are its own, their weights random."""
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip(f"lerobot.policies.{kind}.modeling_{kind}")
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    if kind.startswith("pi0"):
        monkeypatch.setattr(module, "get_gemma_config", lambda variant: module.GemmaConfig(16, 1, 16, 2, 1, 8))
        paligemma = lambda: transformers.PaliGemmaConfig(vision_config=dict(model_type="siglip_vision_model", patch_size=14, **tiny))  # noqa: E731
        monkeypatch.setattr(module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": module.CONFIG_MAPPING["gemma"]})
        for name in ("AutoProcessor", "AutoTokenizer") if kind == "pi0_fast" else ():
            monkeypatch.setattr(getattr(module, name), "from_pretrained", lambda *args, **options: None)
        return built(kind, size=224)
    if kind == "smolvla":
        expert = pytest.importorskip("lerobot.policies.smolvla.smolvlm_with_expert")
        text = dict(model_type="llama", num_key_value_heads=1, head_dim=8, vocab_size=64, pad_token_id=0, **tiny)
        config = transformers.SmolVLMConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **tiny), scale_factor=2)
        monkeypatch.setattr(expert.AutoConfig, "from_pretrained", lambda name: config)
        names = ("fake_image_token_id", "global_image_token_id")
        processor = Having(tokenizer=Having(**dict.fromkeys(names, 1)))
        monkeypatch.setattr(expert.AutoProcessor, "from_pretrained", lambda name: processor)
        return built(kind, resize_imgs_with_padding=(32, 32), num_vlm_layers=1, train_expert_only=False, freeze_vision_encoder=False)
    if kind == "xvla":
        stage = dict(depths=(1,), patch_size=(7,), patch_stride=(4,), patch_padding=(3,), patch_prenorm=(False,), embed_dim=(16,))
        vision = dict(**stage, num_heads=(2,), num_groups=(2,), window_size=4, projection_dim=16)
        text = dict(vocab_size=64, d_model=16, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2)
        text |= dict(decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2)
        florence = dict(vision_config=vision, text_config=text, projection_dim=16)
        return built(kind, florence_config=florence, hidden_size=16, depth=1, num_heads=2, action_mode="auto")
    clip = dict(projection_dim=16, **tiny)
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=32, patch_size=16, **clip))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=64, **clip))
    monkeypatch.setattr(module.CLIPVisionModel, "from_pretrained", lambda name: vision)
    monkeypatch.setattr(module.CLIPTextModel, "from_pretrained", lambda name: text)
    return built(kind, size=32, image_resize_shape=None, image_crop_shape=None, hidden_dim=16, num_layers=1, num_heads=2)


@pytest.mark.lerobot
@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast", "smolvla", "xvla", "multi_task_dit"])
def test_the_registry_finds_the_encoders_of_large_policies(lerobot, kind, monkeypatch):
    """With LeRobot 0.6 and its extras alone."""
    import lerobot as package

    if package.__version__ < "0.6":
        pytest.skip("needs LeRobot 0.6 and transformers")
    policy = shrunk(kind, monkeypatch)
    steps, size = ((2,), 32) if kind == "multi_task_dit" else ((), policy.config.image_features[CAMERA].shape[-1])
    observation = {STATE: torch.randn(3, *steps, 4), CAMERA: torch.rand(3, *steps, 3, size, size)}
    keys = {"multi_task_dit": ["observation"], "pi0": [STATE], "smolvla": [STATE]}.get(kind, [])
    embeds(policy, observation, [*keys, CAMERA])


@pytest.mark.lerobot
def test_the_registry_finds_the_state_encoder_of_groot(lerobot):
    groot = pytest.importorskip("lerobot.policies.groot.groot_n1_7", exc_type=ImportError)
    pytest.importorskip("diffusers")
    tiny = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, output_dim=16)
    config = groot.GR00TN17Config(
        hidden_size=16, input_embedding_dim=16, backbone_embedding_dim=16, max_state_dim=4, state_history_length=2, max_num_embodiments=3,
        diffusion_model_cfg=tiny, vl_self_attention_cfg=None,
    )  # fmt: skip
    policy = torch.nn.Module()
    policy.name, policy._groot_model = "groot", torch.nn.Module()
    policy._groot_model.action_head = groot.GR00TN17ActionHead(config)
    from gpu_ot.lerobot.encoders import embed

    state, robot = torch.randn(3, 2, 4), torch.tensor([0, 1, 2])
    z = embed(policy, "state", state, {"state": state, "embodiment_id": robot})
    expected = policy._groot_model.action_head.state_encoder(state.view(3, 1, -1), robot)
    torch.testing.assert_close(z, expected.flatten(1))


@pytest.mark.lerobot
def test_the_contract_on_a_real_policy(lerobot):
    """The example that configurations in the wild are written by, against a float64 evaluation through POT."""
    import ot

    from gpu_ot.lerobot import OTFeatureSpec, OTLossConfig, compute_ot_loss_for_policy

    policy = built("act", 8, dim_model=32, n_heads=2, dim_feedforward=64, pretrained_backbone_weights=None).double()
    features = [
        OTFeatureSpec(
            src_key="observation.state", tgt_key="observation.state", dim_slice=slice(0, 8), use_learned_embed=True,
            embed_name="joints+gripper", weight_embed=1.0, weight_label=1.0,
        )
    ]  # fmt: skip
    src_obs, tgt_obs = ({STATE: torch.randn(20, 8, dtype=torch.float64)} for _ in range(2))
    z, w = (policy.model.encoder_robot_state_input_proj(obs[STATE]) for obs in (src_obs, tgt_obs))
    M = torch.cdist(z, w).square() + torch.cdist(src_obs[STATE], tgt_obs[STATE]).square()
    a, reg = np.full(20, 1 / 20), float(M.mean()) / 20
    for reg_m in (None, 5.0):
        loss, metrics = compute_ot_loss_for_policy(policy, src_obs, tgt_obs, OTLossConfig(features, reg, reg_m=reg_m, tol=1e-11))
        C = M.detach().numpy()
        if reg_m is None:
            P = ot.sinkhorn(a, a, C, reg, method="sinkhorn_log", stopThr=1e-14, numItermax=100_000)
        else:
            P = ot.unbalanced.sinkhorn_knopp_unbalanced(a, a, C, reg, reg_m, stopThr=1e-14, numItermax=100_000)
        expected = (torch.from_numpy(P) * M).sum()
        assert abs(loss - expected) <= 1e-6 * expected and {"ot_loss", "ot_pi_sum", "ot_pi_diag", f"ot_cost/{STATE}"} <= set(metrics)
        weight = policy.model.encoder_robot_state_input_proj.weight
        ours, theirs = (torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, expected))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
