"""The wrong products that the tests must notice; ``mutants.py`` makes them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong product: ``old`` stands exactly once in ``file`` and becomes ``new``.

    Attributes:
      name: what is wrong with it.
      file: in distpad/.
      world: the engine in which the tests run (tests/worlds.py).
      selection: which tests, as pytest's ``-k`` has it.
    """

    name: str
    file: str
    old: str
    new: str
    world: str
    selection: str


GRADIENT = "test_gradient_equals_one_device and "
MUTANTS = (
    Mutant(
        name="horovod-factor-dropped",
        file="losses.py",
        old="tf.cast(share * tf.cast(backend.share_scale, share.dtype), sums.dtype)",
        new="tf.cast(share, sums.dtype)",
        world="horovod:2",
        selection="test_three_sgd_steps",
    ),
    Mutant(
        name="local-count-for-the-global",
        file="losses.py",
        old="else tf.reduce_sum(table[:, 1])",
        new="else self._count_of(sums)",
        world="mirrored:2",
        selection=GRADIENT + "token-uneven",
    ),
    Mutant(
        name="mean-of-means",
        file="losses.py",
        old="else tf.reduce_sum(table[:, 1])",
        new="else self._count_of(sums) * backend.num_replicas",
        world="mirrored:2",
        selection=GRADIENT + "token-uneven",
    ),
    Mutant(
        name="mean-of-means-horovod",
        file="losses.py",
        old="else tf.reduce_sum(table[:, 1])",
        new="else self._count_of(sums) * backend.num_replicas",
        world="horovod:2",
        selection=GRADIENT + "token-uneven",
    ),
    Mutant(
        name="float16-sum",
        file="averages.py",
        old="row_total = tf.reduce_sum(losses * ones, axis=inner)",
        new="row_total = tf.cast(tf.reduce_sum(tf.cast(losses * ones, tf.float16), axis=inner), losses.dtype)",
        world="mirrored:2",
        selection="test_long_float16_sequences",
    ),
    Mutant(
        name="rows-beyond-rows-gathered",
        file="collectives.py",
        old="padded = _pad(leaf, to)\n",
        new="padded, kept = _pad(leaf, to), None\n",
        world="mirrored:2",
        selection="test_gather_drops_filling_rows",
    ),
    Mutant(
        name="rows-of-length-0-counted",
        file="averages.py",
        old="tf.cast(row_weight > 0, tf.float64)",
        new="tf.cast(row_weight >= 0, tf.float64)",
        world="mirrored:2",
        selection=GRADIENT + "sequence_sum-padding",
    ),
    Mutant(
        name="ctc-rows-of-length-0-counted",
        file="masking.py",
        old='fitting.Source("lengths", lengths > 0)',
        new='fitting.Source("lengths", lengths >= 0)',
        world="mirrored:2",
        selection="test_ctc_of_each_sequence and sequence_sum",
    ),
    Mutant(
        name="padded-rows-counted",
        file="masking.py",
        old='fitting.Source("positions", tokens > 0)',
        new='fitting.Source("positions", tokens >= 0)',
        world="mirrored:2",
        selection="test_rows_of_padding_alone_are_no_sequences",
    ),
    Mutant(
        name="padding-counted",
        file="averages.py",
        old="ones = tf.where(mask, ones, 0)",
        new="ones = tf.ones_like(losses)",
        world="mirrored:2",
        selection=GRADIENT + "token-uneven",
    ),
    Mutant(
        name="maximum-of-one-replica",
        file="collectives.py",
        old="tf.reduce_max(table[:, i])",
        new="table[backend.replica_index(), i]",
        world="mirrored:2",
        selection="test_pad_to_global_max and True",
    ),
    Mutant(
        name="maximum-of-one-replica-horovod",
        file="collectives.py",
        old="tf.reduce_max(table[:, i])",
        new="table[backend.replica_index(), i]",
        world="horovod:2",
        selection="test_pad_to_global_max and True",
    ),
    Mutant(
        name="gradient-not-masked",
        file="losses.py",
        old="masking.clean(y_pred, rows, prediction=True)",
        new="y_pred",
        world="mirrored:2",
        selection="test_padded_places_change_no_bit",
    ),
    Mutant(
        name="differentiated-through-the-exchange",
        file="exchange.py",
        old="packed = tf.stop_gradient(",
        new="packed = tf.identity(",
        world="horovod:2",
        selection="test_going_back_makes_no_collective",
    ),
    Mutant(
        name="one-row-spread-over-all",
        file="losses.py",
        old="masking.fit_rule(sums.rows, sums.fits)",
        new="masking.fit_rule(sums.rows)",
        world="mirrored:2",
        selection="test_rows_of_a_loss_of_sequences_are_not_spread",
    ),
    Mutant(
        name="lengths-overrule-the-mask-of-rows",
        file="masking.py",
        old="said = mask is not None and check_mask(mask).shape.rank == 1",
        new="said = False",
        world="mirrored:2",
        selection="test_a_mask_of_rows_decides_alone_which_rows_count",
    ),
    Mutant(
        name="all-padding-gives-nan",
        file="losses.py",
        old="value = tf.math.divide_no_nan(total, count)",
        new="value = total / count",
        world="mirrored:2",
        selection=GRADIENT + "token-all",
    ),
    Mutant(
        name="counts-of-0-give-nan",
        file="losses.py",
        old="share = tf.math.divide_no_nan(tf.cast(sums.total, tf.float64), tf.cast(count, tf.float64))",
        new="share = tf.cast(sums.total, tf.float64) / tf.cast(count, tf.float64)",
        world="mirrored:2",
        selection="test_counts_of_a_step_without_valid_positions",
    ),
    Mutant(
        name="value-counted-by-every-replica",
        file="losses.py",
        old="value /= tf.cast(backend.replica_count(), value.dtype)",
        new="pass",
        world="mirrored:2",
        selection=GRADIENT + "token-uneven",
    ),
    Mutant(
        name="weights-not-counted",
        file="averages.py",
        old="row_weight = tf.reduce_sum(ones, axis=inner)",
        new="row_weight = tf.reduce_sum(tf.cast(tf.not_equal(ones, 0), ones.dtype), axis=inner)",
        world="mirrored:2",
        selection=GRADIENT + "padding_value+weights",
    ),
    Mutant(
        name="sequence-mean-is-a-sum",
        file="averages.py",
        old="row_total = tf.math.divide_no_nan(row_total, row_weight)",
        new="pass",
        world="mirrored:2",
        selection=GRADIENT + "sequence_mean-uneven",
    ),
    Mutant(
        name="denominator-with-a-collective",
        file="losses.py",
        old="exchange.enforce(_NAME, [*rules, positive])",
        new="exchange.exchange(backend, _NAME, [], rules)",
        world="mirrored:2",
        selection="test_collectives_of_the_loss_are_counted",
    ),
    Mutant(
        name="length-rules-not-exchanged",
        file="losses.py",
        old="exchange.exchange(backend, _NAME, payload, rules, complaint)",
        new="exchange.exchange(backend, _NAME, payload, (), complaint)",
        world="mirrored:2",
        selection="test_wrong_lengths_on_one_replica",
    ),
    Mutant(
        name="stack-multiplied-instead-of-chosen",
        file="backends/base.py",
        old="tf.where(mine, tensor[tf.newaxis], tf.zeros([], tensor.dtype))",
        new="tf.cast(mine, tensor.dtype) * tensor[tf.newaxis]",
        world="mirrored:2",
        selection="test_nan_stays_in_its_slot",
    ),
    Mutant(
        name="broadcast-from-the-wrong-root",
        file="backends/horovod.py",
        old="self._hvd.broadcast(given, root_rank,",
        new="self._hvd.broadcast(given, self.num_workers - 1 - root_rank,",
        world="horovod:2",
        selection="test_broadcast_of_keras_variables",
    ),
    Mutant(
        name="horovod-sums-what-it-should-average",
        file="backends/horovod.py",
        old='op = self._hvd.Average if self.gradient_reduction == "mean" else self._hvd.Sum',
        new="op = self._hvd.Sum",
        world="horovod:2",
        selection="test_three_sgd_steps",
    ),
    Mutant(
        name="regularisation-counted-by-every-replica",
        file="gradients.py",
        old="return total * (share_scale / replicas)",
        new="return total",
        world="mirrored:2",
        selection="test_regularisation_counts_once",
    ),
    # -- the pipeline -------------------------------------------------------------------------------------------------
    Mutant(
        name="pipeline-padded-further-than-the-longest",
        file="pipeline/plan.py",
        old="agreed = tuple(max(1, int(size)) for size in longest[step])",
        new="agreed = tuple(int(size) + 1 for size in longest[step])",
        world="multiworker:2",
        selection="test_every_example_once and uneven-32-list",
    ),
    Mutant(
        name="pipeline-counts-of-one-worker",
        file="backends/strategy.py",
        old="table[:, len(maxima) :].sum(axis=0)",
        new="table[self.worker_index, len(maxima) :]",
        world="multiworker:2",
        selection="test_every_example_once and uneven-32-list",
    ),
    Mutant(
        name="pipeline-counts-averaged-horovod",
        file="backends/horovod.py",
        old='self._all_reduce(sums, self._hvd.Sum, f"distpad_{name}_sum")',
        new='self._all_reduce(sums, self._hvd.Average, f"distpad_{name}_sum")',
        world="horovod:2",
        selection="test_with_a_sampler",
    ),
    Mutant(
        name="pipeline-counts-of-one-micro-batch",
        file="pipeline/plan.py",
        old="counts = tokens[group].sum(axis=0), sequences[group].sum(axis=0)",
        new="counts = tokens[step], sequences[step]",
        world="mirrored:2",
        selection="test_counts_are_those_of_the_whole_group",
    ),
    Mutant(
        name="pipeline-filling-counted",
        file="pipeline/features.py",
        old="if feature.name in emptied:",
        new="if not feature.name:",
        world="mirrored:2",
        selection="test_every_example_once and uneven-32-list",
    ),
    Mutant(
        name="pipeline-empty-sequences-counted",
        file="pipeline/reading.py",
        old="self.report.sequences[at, i] += counted > 0",
        new="self.report.sequences[at, i] += 1",
        world="mirrored:2",
        selection="test_every_example_once and uneven-32-list",
    ),
    Mutant(
        name="pipeline-weights-not-counted",
        file="pipeline/reading.py",
        old="counted = float(length) if weights is None else",
        new="counted = float(length) if True else",
        world="mirrored:2",
        selection="test_weights_are_counted",
    ),
    Mutant(
        name="pipeline-every-feature-its-own-rung",
        file="pipeline/plan.py",
        old="return tuple(ladder.rung(index) for ladder in ladders)",
        new="return tuple(ladder(size) for ladder, size in zip(ladders, agreed))",
        world="mirrored:2",
        selection="test_ladders_make_one_shape_a_rung",
    ),
    Mutant(
        name="pipeline-resumes-one-step-late",
        file="pipeline/batches.py",
        old="first = step * size * here",
        new="first = (step + 1) * size * here if step else 0",
        world="mirrored:2",
        selection="test_going_on_in_the_middle_of_an_epoch",
    ),
    Mutant(
        name="pipeline-forgotten-shard-not-seen",
        file="pipeline/epoch.py",
        old="if sums[1] > 1 and maxima[6] == -maxima[7]",
        new="if sums[1] > 1 and maxima[6] < -maxima[7]",
        world="multiworker:2",
        selection="test_a_forgotten_shard",
    ),
)
