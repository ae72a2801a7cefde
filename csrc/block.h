// The contract: what a looped block is. The kernels of every backend read this header, and Python reads it through
// their modules (module.h): an option, a weight or a size is named here and nowhere else.
#pragma once
#include <cstdint>

// Options, and their names in Python in the order of the values.
enum Activation { RELU, GELU, GELU_TANH, SWIGLU, RELU2 };
constexpr const char* ACTIVATIONS[] = {"relu", "gelu", "gelu_tanh", "swiglu", "relu2"};

enum Norm { LAYERNORM, RMSNORM, NO_NORM };
constexpr const char* NORMS[] = {"layernorm", "rmsnorm", "none"};

enum Placement { PRE, POST, SANDWICH };
constexpr const char* PLACEMENTS[] = {"pre", "post", "sandwich"};

enum Position { NO_POSITION, ROPE };
constexpr const char* POSITIONS[] = {"none", "rope"};

enum Injection { NO_INJECTION, ADD_INPUT };
constexpr const char* INJECTIONS[] = {"none", "add"};

// A layer's weights, and their names in Python after "layers.<i>.".
enum Weight {
    QKV_W, QKV_B, OUT_W, OUT_B, N1_W, N1_B, N1P_W, N1P_B,
    UP_W, UP_B, DOWN_W, DOWN_B, N2_W, N2_B, N2P_W, N2P_B
};
constexpr const char* LAYER_WEIGHTS[] = {
    "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
    "norm1.weight", "norm1.bias", "norm1_post.weight", "norm1_post.bias",
    "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
    "norm2.weight", "norm2.bias", "norm2_post.weight", "norm2_post.bias",
};
constexpr const char* LOOP_NORM_WEIGHTS[] = {"loop_norm.weight", "loop_norm.bias"};
constexpr int WEIGHTS = sizeof LAYER_WEIGHTS / sizeof *LAYER_WEIGHTS;

struct Block {
    int64_t d_model, n_heads, n_kv_heads, head_dim, n_layers, d_ff;  // d_ff 0: attention alone
    int64_t activation, norm, placement, position, injection;        // as the enums above
    int64_t causal, loop_norm;                                       // 0 or 1
    double eps, residual_scale;
};

// Addresses of a block's weights: WEIGHTS a layer in the order of `Weight`, null where absent, then the loop norm's 2.
constexpr int64_t weight_count(const Block& b) { return b.n_layers * WEIGHTS + 2; }

constexpr int64_t hidden_parts(const Block& b) { return b.activation == SWIGLU ? 2 : 1; }  // gate and values
constexpr int64_t query_columns(const Block& b) { return b.n_heads * b.head_dim; }
constexpr int64_t qkv_columns(const Block& b) { return (b.n_heads + 2 * b.n_kv_heads) * b.head_dim; }

// Columns of the CPU's buffers are padded to whole vectors, of the widest instruction set.
constexpr int64_t cpu_padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// What the CPU forward keeps of a token in a loop for the backward, in floats: each layer's input and the state
// between its halves, with post-norm and sandwich both branches' results; q k v, o and the hidden units before their
// activation as operands of products are, two bfloat16 to a float. And what the loop norm reads.
constexpr int64_t kept_floats(const Block& b, bool bf16) {
    const int64_t d = cpu_padded(b.d_model), branches = b.placement == PRE ? 0 : 2 * d;
    const int64_t operands = cpu_padded(qkv_columns(b)) + cpu_padded(query_columns(b)) + hidden_parts(b) * cpu_padded(b.d_ff);
    return b.n_layers * (2 * d + branches + cpu_padded(operands / (bf16 ? 2 : 1))) + (b.loop_norm ? d : 0);
}
