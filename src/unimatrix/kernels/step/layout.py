"""Where the compiled step finds what: numbers of columns, for ``weights.py`` and ``native.py``.

Weights lie one after the other in a single array; a matrix is stored [inputs, outputs], so that a
product is a sum of rows.
"""

# Starts in the array of weights, -1 for what a model lacks.
(
    EMBED,  # [V, D]
    POSITIONS,  # [P, D]
    DEPTH,  # [L, D]
    MODULATION,  # [V, D], the factors themselves
    CONTEXT,  # [V, D], residual context
    NORM,  # [D]
    NORM_BIAS,  # [D]
    INPUT,  # [D, J], everything that is projected from the normalised stream
    INPUT_BIAS,  # [J]
    OUTPUT,  # [H N, D], of the matrix mixer
    FFN_NORM,  # [D]
    FFN_NORM_BIAS,  # [D]
    UP,  # [D, F], or [D, 2 F] with the gate's half first
    UP_BIAS,  # [F]
    DOWN,  # [F, D]
    DOWN_BIAS,  # [D]
    FINAL_NORM,  # [D]
    FINAL_NORM_BIAS,  # [D]
    HEAD,  # [D, V]
    QUERY,  # [D, C], of the slots
    KEY,  # [D, C]
    VALUE,  # [D, D], of the slots or the selective slots
    WRITE_GATE,  # [2 D, 1]
    WRITE_GATE_BIAS,  # [1]
    GATE_UP,  # [2 D or 3 D, D / 2], of the selective slots
    GATE_UP_BIAS,  # [D / 2]
    GATE_DOWN,  # [D / 2, patterns]
    GATE_DOWN_BIAS,  # [patterns]
    READ_SCORE,  # [Q]
    MIXTURE,  # [D, Q + 1 + H'], scores of the reads, of the automaton and of the index's heads
    MIXTURE_BIAS,  # [Q + 1 + H']
    LENGTH_SCORE,  # [buckets]
    CONV,  # [K, D], of the short convolution
    VECTORS,  # [D, 3 H N or 4 H N], queries, keys and values of what was convolved
    # Of the indexed attention, with H' heads of C; features are embeddings over their root mean
    # square, and its values are those of every token of the vocabulary.
    FEATURE_SCALE,  # [V], what makes features of embeddings
    PLACE_VALUES,  # [V, H' C]
    KEY_CONV,  # [2, 12, D], of the tokens before a token, and of those from it on
    KEY_MIX,  # [D, D]
    KEY_MIX_BIAS,  # [D]
    PLACE_KEY,  # [D, H' C]
    PLACE_QUERY,  # [D, 2 H' C + 80 H' + 11 H' + 9 H'], queries of entries and of units, biases of
    #               offsets and of kinds of places, and scores of nothing
    PLACE_QUERY_BIAS,  # [2 H' C + 80 H' + 11 H' + 9 H']
    UNIT_KIND,  # [11, H' C], added to queries of units
    TEMPERATURE,  # [2, H']
    COUNT_BIAS,  # [8, H']
    AGE_BIAS,  # [8, H']
    MATCH_BIAS,  # [H', 17]
    BOUNDARY,  # [V, 2 H'], of a token itself, with the bias, and of the one before another
    PLACE_OUTPUT,  # [H' C, D]
) = range(49)
NUM_WEIGHTS = 49

# Sizes and choices.
(
    HIDDEN_SIZE,  # D
    NUM_DEPTH_STEPS,
    NUM_HEADS,
    HEAD_DIM,
    INNER_SIZE,
    NUM_PROJECTED,  # J
    LAYER_NORM,  # otherwise the root mean square
    GATED,  # SwiGLU
    HAS_MATRIX,
    MIXES_RULES,
    NORM_GUARD,
    NORMALIZED_KEYS,
    CONTEXT_PATH,  # one of NO_CONTEXT, PREVIOUS_TOKEN, AUTOMATON
    PAD_ID,
    ASSOCIATIONS,  # one of NO_ASSOCIATIONS, SLOTS, SELECTIVE, INDEXED
    FROM_HIDDEN,  # their source, or what their gate sees
    POINTER_VOTES,
    NUM_READS,  # what the slots answer with, K or Q
    NUM_SLOT_SCORES,  # Q if the mixture weighs them, else 0
    AUTOMATON_SCORE,  # whether the automaton's token is in the mixture
    NUM_LENGTH_BUCKETS,
    MARGIN,
    KEEP_FIRST,
    FADE_TOKENS,
    USES_DELTA,
    INDEX_HEADS,  # H'
    INDEX_HEAD_DIM,  # C
    INDEX_READS_AT,
    NUM_HEAD_SCORES,  # H' if the mixture weighs its heads, else 0
) = range(29)
NUM_SIZES = 29
NO_CONTEXT, PREVIOUS_TOKEN, AUTOMATON = range(3)
NO_ASSOCIATIONS, SLOTS, SELECTIVE, INDEXED = range(4)

# First column of each part of what is projected from the normalised stream, -1 for what is absent.
(
    QKVD,  # queries, keys, values and, with rules, what the diagonal rule writes, [H, N] each;
    #        absent with a short convolution, which they are projected from
    RETENTION,  # [H]
    RULES,  # [H, R]
    MATRIX_GATE,  # [D]
    READ_GATE,  # [D]
    CONTEXT_GATE,  # [D]
    POINTER_GATE,  # [1]
    WRITE_STRENGTH,  # [H], with the delta rule
) = range(8)

# Numbers.
NORM_EPS, MATCH_THRESHOLD, STRENGTH_FLOOR = range(3)

# What is counted for each row.
NUM_TOKENS, LAST_TOKEN_ID, TEXT_HASH = range(3)

# Neighbouring columns of the index whose keys lie number by number side by side.
KEY_BLOCK = 16
