// The contract: what a looped block is. The kernels of every backend read this header, and Python reads it through
// their modules (module.h): an option, a weight or a size is named here and nowhere else.
#pragma once
#include <cstdint>

// Options, and their names in Python in the order of the values.
enum Activation { RELU, GELU, GELU_TANH, SWIGLU, RELU2, GEGLU_TANH };
constexpr const char* ACTIVATIONS[] = {"relu", "gelu", "gelu_tanh", "swiglu", "relu2", "geglu_tanh"};

enum Norm { LAYERNORM, RMSNORM, NO_NORM };
constexpr const char* NORMS[] = {"layernorm", "rmsnorm", "none"};

enum Placement { PRE, POST, SANDWICH, SANDWICH_POST };
constexpr const char* PLACEMENTS[] = {"pre", "post", "sandwich", "sandwich_post"};

enum NormFactor { WEIGHT_ITSELF, ONE_PLUS_WEIGHT, NO_WEIGHT };
constexpr const char* NORM_FACTORS[] = {"scale", "one_plus", "none"};

enum Position { NO_POSITION, ROPE };
constexpr const char* POSITIONS[] = {"none", "rope"};

enum Injection { NO_INJECTION, ADD_INPUT, CONCAT_INPUT, DIAGONAL, NORM_ADD };
constexpr const char* INJECTIONS[] = {"none", "add", "concat", "diagonal", "norm_add"};

// A layer's weights, and their names in Python after "layers.<i>.".
enum Weight {
    QKV_W, QKV_B, OUT_W, OUT_B, N1_W, N1_B, N1P_W, N1P_B,
    UP_W, UP_B, DOWN_W, DOWN_B, N2_W, N2_B, N2P_W, N2P_B, QN_W, QN_B, KN_W, KN_B
};
constexpr const char* LAYER_WEIGHTS[] = {
    "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
    "norm1.weight", "norm1.bias", "norm1_post.weight", "norm1_post.bias",
    "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
    "norm2.weight", "norm2.bias", "norm2_post.weight", "norm2_post.bias",
    "self_attn.q_norm.weight", "self_attn.q_norm.bias", "self_attn.k_norm.weight", "self_attn.k_norm.bias",
};
constexpr int WEIGHTS = sizeof LAYER_WEIGHTS / sizeof *LAYER_WEIGHTS;

// A loop's own weights.
enum LoopWeight {
    LOOP_NORM_W, LOOP_NORM_B, INJECT_W, INJECT_B, INJECT_DECAY, INJECT_GAIN, INJECT_NORM_W, INJECT_NORM_B, INJECT_ALPHA
};
constexpr const char* LOOP_WEIGHTS[] = {
    "loop_norm.weight", "loop_norm.bias", "injection.weight", "injection.bias", "injection.decay", "injection.gain",
    "injection.norm.weight", "injection.norm.bias", "injection.alpha",
};
constexpr int OF_LOOP = sizeof LOOP_WEIGHTS / sizeof *LOOP_WEIGHTS;

struct Block {
    int64_t d_model, n_heads, n_kv_heads, head_dim, n_layers, d_ff;  // d_ff 0: attention alone
    int64_t activation, norm, placement, norm_factor, position, injection;  // as the enums above
    int64_t causal, loop_norm, qk_norm;                              // 0 or 1
    int64_t rotary_pairs;                                            // a head's first 2 * rotary_pairs columns rotate
    double eps, residual_scale;
    int64_t window;              // positions that a query sees, itself included; 0: all
    double softcap, attn_scale;  // of scores; 0: none, and head_dim to the power of -1/2
};

// Addresses of a block's weights, null where absent: WEIGHTS a layer in the order of `Weight`, then the loop's.
constexpr int64_t weight_count(const Block& b) { return b.n_layers * WEIGHTS + OF_LOOP; }

constexpr bool is_gated(int64_t activation) { return activation == SWIGLU || activation == GEGLU_TANH; }
constexpr int64_t hidden_parts(const Block& b) { return is_gated(b.activation) ? 2 : 1; }  // gate and values
constexpr int64_t query_columns(const Block& b) { return b.n_heads * b.head_dim; }
constexpr int64_t qkv_columns(const Block& b) { return (b.n_heads + 2 * b.n_kv_heads) * b.head_dim; }

// Whether an injection's backward reads the state before the loop: its weights are multiplied by it.
constexpr bool reads_state(const Block& b) { return b.injection > ADD_INPUT; }

// Columns of the CPU's buffers are padded to whole vectors, of the widest instruction set.
constexpr int64_t cpu_padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// What the CPU forward keeps of a token in a loop for the backward, in floats: each layer's input and the state
// between its halves, with post-norm and sandwich both branches' results; o, and of each head's scores the largest and
// the sum of their weights; q k v and the hidden units before their activation as operands of products are, two
// bfloat16 to a float, and q and k from before their norm likewise. And what the loop norm and the injection read.
constexpr int64_t kept_floats(const Block& b, bool bf16) {
    const int64_t d = cpu_padded(b.d_model), branches = b.placement == PRE ? 0 : 2 * d;
    const int64_t attention = cpu_padded(query_columns(b)) + cpu_padded(2 * b.n_heads);
    const int64_t before_norm = b.qk_norm ? cpu_padded((b.n_heads + b.n_kv_heads) * b.head_dim) : 0;
    const int64_t operands = cpu_padded(qkv_columns(b)) + hidden_parts(b) * cpu_padded(b.d_ff) + before_norm;
    const int64_t layer = 2 * d + branches + attention + cpu_padded(operands / (bf16 ? 2 : 1));
    const int64_t of_loop = (b.loop_norm ? d : 0) + (reads_state(b) ? d : 0);
    return b.n_layers * layer + of_loop;
}
