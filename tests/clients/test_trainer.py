import numpy as np
import pytest

from clients.trainer import EpochResult, accuracy, derive_seed, follow
from flwr_colearn import ColearnError, CyclicalRate, LocalPlan


class Diary:
    """A trainer without a model: it writes down what it is asked for."""

    def __init__(self):
        self.epochs = []

    def train_epoch(self, learning_rate, seed):
        self.epochs.append((learning_rate, seed))
        return EpochResult(loss=1 / len(self.epochs), num_examples=7)


def followed(*plans, seed=0):
    """The (learning rate, seed) of every epoch of some plans, followed by one trainer."""
    diary = Diary()
    for plan in plans:
        follow(plan, diary, seed)
    return diary.epochs


def seeds_of(*plans, seed=0):
    return [epoch_seed for _, epoch_seed in followed(*plans, seed=seed)]


def test_every_epoch_has_the_rate_of_equation_3():
    plan = LocalPlan.of(CyclicalRate(0.01, 0.25), 1, 4)
    rates = [rate for rate, _ in followed(plan)]
    assert rates == [0.01 * 0.25 ** (j / 4) for j in (1, 2, 3, 4)]


def test_the_last_epoch_is_reported():
    metrics = follow(LocalPlan.of(CyclicalRate(0.01, 0.25), 1, 4), Diary(), seed=0)
    assert metrics == {"num-examples": 7, "train-loss": 0.25, "learning-rate": 0.0025}


def test_every_epoch_of_a_run_has_a_seed_of_its_own():
    rounds = [LocalPlan(i + 1, 5, 0.01, epochs_done=5 * i) for i in range(40)]
    assert len(set(seeds_of(*rounds))) == 200


def test_a_restarted_round_repeats_itself():
    plan = LocalPlan(3, 4, 0.01, epochs_done=8)
    again = seeds_of(plan, plan)
    assert again[:4] == again[4:]


def test_seeds_follow_the_epochs_of_the_run_however_they_fall_into_rounds():
    parts = LocalPlan(1, 1, 0.01), LocalPlan(2, 3, 0.01, epochs_done=1)
    assert seeds_of(*parts) == seeds_of(LocalPlan(1, 4, 0.01))


def test_participants_with_other_seeds_train_with_other_seeds():
    plan = LocalPlan(1, 50, 0.01)
    assert not set(seeds_of(plan, seed=0)) & set(seeds_of(plan, seed=1))


def test_derived_seeds_fit_every_generator_and_depend_on_every_number_and_its_place():
    numbers = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (7, 3), (2**32 - 1, 3)]
    seeds = [derive_seed(*each) for each in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [derive_seed(*each) for each in numbers]


def test_accuracy_by_hand():
    outputs = np.array([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    assert accuracy(outputs, np.array([0, 1, 1])) == pytest.approx(2 / 3)


class Scaled:
    """A trainer with loss scaling, whose passes make the given (loss, steps, skipped)."""

    def __init__(self, *passes):
        self.passes, self.seeds = list(passes), []

    def train_epoch(self, learning_rate, seed):
        self.seeds.append(seed)
        loss, steps, skipped = self.passes[min(len(self.seeds), len(self.passes)) - 1]
        return EpochResult(loss, 48, steps, skipped)


def test_an_epoch_without_a_step_is_repeated_and_skipped_steps_are_reported():
    trainer = Scaled((5.0, 0, 3), (5.0, 0, 3), (5.0, 2, 1), (4.0, 3, 0))
    metrics = follow(LocalPlan(1, 2, 0.1), trainer, seed=0)
    assert metrics["train-loss"] == 4.0
    assert metrics["skipped-steps"] == 7
    assert len(trainer.seeds) == 4
    assert len(set(trainer.seeds)) == 2  # a repeated pass has the data in the same order


@pytest.mark.parametrize(("loss", "passes"), [(5.0, 20), (float("nan"), 1), (float("inf"), 1)])
def test_a_round_without_a_step_is_an_error(loss, passes):
    trainer = Scaled((loss, 0, 3))
    with pytest.raises(ColearnError, match="expected at least one step, found all 3 skipped"):
        follow(LocalPlan(1, 2, 0.1), trainer, seed=0)
    assert len(trainer.seeds) == passes


# Steps in place of local epochs


class Stepper(Diary):
    """One whose pass over the data has five mini-batches of four examples."""

    def train_epoch(self, learning_rate, seed, steps=5):
        self.epochs.append((learning_rate, seed, steps))
        return EpochResult(loss=1.0, num_examples=4 * steps)

    def batches_per_epoch(self):
        return 5


def test_a_plan_with_steps_is_trained_in_passes_over_the_data():
    trainer = Stepper()
    plan = LocalPlan.of(CyclicalRate(0.16, 0.25), 3, 1, epochs_done=2, local_steps=12)
    metrics = follow(plan, trainer, seed=7)
    assert [steps for _, _, steps in trainer.epochs] == [5, 5, 2]
    rates = [0.16 * 0.25 ** (j / 3) for j in (1, 2, 3)]
    assert [rate for rate, _, _ in trainer.epochs] == pytest.approx(rates)
    # The site's examples, and not those of the last, shorter pass.
    assert metrics == {"num-examples": 20, "train-loss": 1.0, "learning-rate": 0.04}


def test_every_pass_of_a_run_in_steps_has_a_seed_of_its_own():
    trainer = Stepper()
    for i in range(20):
        follow(LocalPlan(i + 1, 1, 0.1, epochs_done=i, local_steps=12), trainer, seed=0)
    assert len({seed for _, seed, _ in trainer.epochs}) == 60


def test_an_interrupted_round_in_steps_goes_on_with_the_same_passes(tmp_path):
    class Dies(Stepper):
        weights = 0.0

        def train_epoch(self, learning_rate, seed, steps=5):
            if len(self.epochs) == self.until:
                raise OSError("power failure")
            self.weights += learning_rate * steps
            return super().train_epoch(learning_rate, seed, steps)

        def get_weights(self):
            return {"w": np.array(self.weights)}

        def set_weights(self, weights):
            self.weights = float(weights["w"])

    plan = LocalPlan.of(CyclicalRate(0.16), 1, 1, local_steps=12)
    whole, dying, again = Dies(), Dies(), Dies()
    whole.until, dying.until, again.until = None, 2, None
    expected = follow(plan, whole, 7)
    with pytest.raises(OSError, match="power"):
        follow(plan, dying, 7, str(tmp_path))
    assert follow(plan, again, 7, str(tmp_path)) == expected
    assert again.epochs == whole.epochs[2:]
    assert again.weights == whole.weights
