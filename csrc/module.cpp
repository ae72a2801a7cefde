// shift_kernels._native: the CPU kernels for Python.
#include <optional>

#include "cpu/entry.h"
#include "module.h"

namespace {

using namespace shift_module;

// A call that owns its lists of addresses.
struct PythonCall : Call {
    std::vector<const float*> weight_list;
    std::vector<float*> grad_weight_list;
};

void check(bool right, const char* what) {
    if (!right) throw py::value_error(std::string("shift_kernels._native: ") + what);
}

// What every use of a call reads.
void check_sizes(const Call& c) {
    check(c.batch >= 0 && c.seq_len >= 0 && c.most_loops >= 0 && c.n_threads > 0, "a size is negative");
    check(c.n_layers > 0 && c.n_layers <= MOST_LAYERS, "n_layers is not from 1 to MOST_LAYERS");
    check(c.n_kv_heads > 0 && c.head_dim > 0 && c.d_model > 0, "the block has no sizes");
    check(!c.batch || (c.loops && c.lengths), "loops or lengths are missing");
}

bool signalled() {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

const char* best() { return shift_cpu::ISAS[shift_cpu::best_isa()]; }

int isa_index(const std::optional<std::string>& isa) {
    const int best = shift_cpu::best_isa();
    if (!isa) return best;
    for (int i = 0; i <= best; i++)
        if (*isa == shift_cpu::ISAS[i]) return i;
    throw py::value_error("shift_kernels._native: this processor has no " + *isa);
}

void run(const PythonCall& given, bool backward, const std::optional<std::string>& isa) {
    Call call = given;
    check_sizes(call);
    const int index = isa_index(isa);
    const size_t n = weight_count(call);
    check(given.weight_list.size() == n && (!backward || given.grad_weight_list.size() == n),
          "weights are not the block's");
    check(call.e && (call.position != ROPE || call.rotary), "e or rotary is missing");
    const bool loops = call.most_loops > 0;  // torch's empty tensors have no address
    check(!backward || !call.h0 == !call.grad_h0, "h0 and its gradient go together");
    check(backward ? (call.grad_out || !loops) && call.grad_e && (call.kept || call.boundaries || !loops)
                   : (call.out || (call.return_all && !loops)) && call.used,
          "an address that is read or written is missing");
    call.weights = given.weight_list.data(), call.grad_weights = given.grad_weight_list.data();
    shift_cpu::Outcome outcome;
    {
        py::gil_scoped_release others_run;
        const shift_cpu::Planned planned(call);
        outcome = shift_cpu::run(planned, backward, index, signalled);
    }
    if (outcome == shift_cpu::STOPPED) throw py::error_already_set();  // what the signal raised
    if (outcome == shift_cpu::NO_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, "shift_kernels: no memory for the looped block's workspace");
        throw py::error_already_set();
    }
}

void attention(const AttentionCall& c, bool backward, const std::optional<std::string>& isa) {
    check(c.batch > 0 && c.n_heads > 0 && c.n_kv_heads > 0 && c.q_len > 0 && c.k_len > 0 && c.head_dim > 0 &&
              c.n_threads > 0 && c.window >= 0, "a size is not positive");
    check(c.q && c.k && c.v && c.o && c.kept && c.q_lens && c.k_lens, "an address is missing");
    check(!backward || (c.d_o && c.dq && c.dk && c.dv), "a gradient's address is missing");
    const int index = isa_index(isa);
    shift_cpu::Outcome outcome;
    {
        py::gil_scoped_release others_run;
        outcome = shift_cpu::attention(c, backward, index);
    }
    if (outcome == shift_cpu::NO_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, "shift_kernels: no memory for attention's workspace");
        throw py::error_already_set();
    }
}

py::dict plan(const PythonCall& call) {
    check_sizes(call);
    const shift_cpu::Planned planned(call);
    py::dict found;
    found["n_tiles"] = planned.plan.n_tiles;
    found["most_rows"] = planned.plan.most_rows;
    found["n_slices"] = planned.plan.n_slices;
    return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The CPU kernels (csrc/cpu). It takes addresses and sizes, whose memory must outlive a call.";
    bind_block(m);
    Structure<PythonCall>(m, "Call")
        .call_fields()
        .number("n_threads", &PythonCall::n_threads)
        .number("rotary_rows", &PythonCall::rotary_rows)
        .number("cache_len", &PythonCall::cache_len)
        .number("cache_loops", &PythonCall::cache_loops)
        .number("bf16", &PythonCall::bf16)
        .number("bf16_weights", &PythonCall::bf16_weights)
        .number("residual_scale", &PythonCall::residual_scale)
        .pointer("scales", &PythonCall::scales)
        .pointer("h0", &PythonCall::h0)
        .pointer("kept", &PythonCall::kept)
        .pointer("cache", &PythonCall::cache)
        .pointer("before", &PythonCall::before)
        .pointer("positions", &PythonCall::positions)
        .pointer("grad_e", &PythonCall::grad_e)
        .pointer("grad_h0", &PythonCall::grad_h0)
        .pointers("grad_weights", &PythonCall::grad_weight_list)
        .made_from<Block>();
    m.def("run", run, py::arg("call"), py::kw_only(), py::arg("backward"), py::arg("isa") = py::none(),
          "Run a forward or backward call; by default with the best instruction set of this processor.");
    Structure<AttentionCall>(m, "AttentionCall")
        .number("batch", &AttentionCall::batch)
        .number("n_heads", &AttentionCall::n_heads)
        .number("n_kv_heads", &AttentionCall::n_kv_heads)
        .number("q_len", &AttentionCall::q_len)
        .number("k_len", &AttentionCall::k_len)
        .number("head_dim", &AttentionCall::head_dim)
        .number("n_threads", &AttentionCall::n_threads)
        .number("causal", &AttentionCall::causal)
        .number("window", &AttentionCall::window)
        .number("scale", &AttentionCall::scale)
        .number("softcap", &AttentionCall::softcap)
        .pointer("q_lens", &AttentionCall::q_lens)
        .pointer("k_lens", &AttentionCall::k_lens)
        .pointer("q", &AttentionCall::q)
        .pointer("k", &AttentionCall::k)
        .pointer("v", &AttentionCall::v)
        .pointer("o", &AttentionCall::o)
        .pointer("kept", &AttentionCall::kept)
        .pointer("d_o", &AttentionCall::d_o)
        .pointer("dq", &AttentionCall::dq)
        .pointer("dk", &AttentionCall::dk)
        .pointer("dv", &AttentionCall::dv)
        .made_from_keywords();
    m.def("attention", attention, py::arg("call"), py::kw_only(), py::arg("backward"), py::arg("isa") = py::none(),
          "Attention by itself, forward or backward.");
    m.def("plan", plan, py::arg("call"), "How a call is cut up; reads its sizes, loops and lengths.");
    m.def("kept_floats", kept_floats, py::arg("block"), py::arg("bf16"),
          "Floats kept of a token in a loop for the backward.");
    m.def("build_info", [] { return std::string(shift_cpu::build_info()) + "; using " + best(); },
          "Compiler, instruction sets and threading of this build; and what run() uses by default.");
    m.def("best_isa", best, "What run() uses by default.");
    m.attr("ISAS") = tuple_of(shift_cpu::ISAS);
    m.attr("MOST_LAYERS") = MOST_LAYERS;
}
