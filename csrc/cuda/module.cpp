// shift_kernels._native_cuda: the CUDA kernels for Python; in the tests, their emulation on the CPU.
#include <array>
#include <cstring>

#include "../module.h"
#include "entry.h"
#include "shape.h"

namespace {

using namespace shift_module;

// A call that owns its list of addresses.
struct PythonCall : Call {
    std::vector<const void*> weight_list;
};

Plan plan(const PythonCall& call, bool backward) {
    Plan found;
    shift_cuda_plan(&call, backward, &found);
    return found;
}

std::optional<std::string> reason(const Plan& plan) {
    if (plan.refusal == FITS) return std::nullopt;
    return shift_cuda_reason(int(plan.refusal));
}

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("shift_kernels: the cuda backend's launch failed: ") + error);
}

void pack(const PythonCall& given, const Plan& plan, uintptr_t stream) {
    Call call = given;
    if (int64_t(given.weight_list.size()) != weight_count(call) || !call.packed)
        throw py::value_error("shift_kernels._native_cuda: packed or some of the block's weights are missing");
    call.weights = given.weight_list.data();
    py::gil_scoped_release others_run;
    check(shift_cuda_pack(&call, &plan, reinterpret_cast<void*>(stream)));
}

// Of a call as planned; what shape.cu takes. Two kernels are the same if these are.
std::array<int64_t, shift_cuda::SHAPE_WORDS> shape(const PythonCall& call, const Plan& plan, bool backward) {
    std::array<int64_t, shift_cuda::SHAPE_WORDS> words;
    const shift_cuda::Shape found = shift_cuda::shape_of(call, plan, backward);
    std::memcpy(words.data(), &found, sizeof found);
    return words;
}

// kernel: shift_cuda_run_shape of the shape's own library, or 0.
void run(const PythonCall& call, const Plan& plan, bool backward, uintptr_t stream, uintptr_t kernel) {
    if (!call.e || !call.packed || (plan.workspace_bytes && !call.workspace))
        throw py::value_error("shift_kernels._native_cuda: e, packed or workspace is missing");
    py::gil_scoped_release others_run;
    const auto launch = kernel ? reinterpret_cast<decltype(&shift_cuda_run)>(kernel) : shift_cuda_run;
    check(launch(&call, &plan, backward, reinterpret_cast<void*>(stream)));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
    m.doc() = "The CUDA kernels (csrc/cuda). It takes addresses and sizes, whose memory must outlive a call.";
    bind_block(m);
    Structure<PythonCall>(m, "Call")
        .call_fields()
        .number("low", &PythonCall::low)
        .number("high", &PythonCall::high)
        .number("own_loops", &PythonCall::own_loops)
        .number("ragged", &PythonCall::ragged)
        .number("save", &PythonCall::save)
        .choice("dtype", &PythonCall::dtype, DTYPES)
        .choice("compute_dtype", &PythonCall::compute_dtype, DTYPES)
        .choice("weight_dtype", &PythonCall::weight_dtype, DTYPES)
        .number("shared_bytes", &PythonCall::shared_bytes)
        .number("n_sms", &PythonCall::n_sms)
        .number("sm90a", &PythonCall::sm90a)
        .number("own_kernel", &PythonCall::own_kernel)
        .pointer("packed", &PythonCall::packed)
        .pointer("workspace", &PythonCall::workspace)
        .pointer("dh", &PythonCall::dh)
        .pointer("de", &PythonCall::de)
        .pointer("dv", &PythonCall::dv)
        .pointer("xn", &PythonCall::xn)
        .pointer("dqkv", &PythonCall::dqkv)
        .pointer("o", &PythonCall::o)
        .pointer("dy", &PythonCall::dy)
        .pointer("xn2", &PythonCall::xn2)
        .pointer("dpre", &PythonCall::dpre)
        .pointer("act", &PythonCall::act)
        .pointer("dy2", &PythonCall::dy2)
        .made_from<Block>();
    Structure<Plan>(m, "Plan")
        .number("refusal", &Plan::refusal)
        .number("rows", &Plan::rows)
        .number("sequences", &Plan::sequences)
        .number("split", &Plan::split)
        .number("programs", &Plan::programs)
        .number("blocks", &Plan::blocks)
        .number("threads", &Plan::threads)
        .number("kv_heads", &Plan::kv_heads)
        .number("remote_rows", &Plan::remote_rows)
        .number("ff_pad", &Plan::ff_pad)
        .number("ff_chunk", &Plan::ff_chunk)
        .number("stages", &Plan::stages)
        .number("tiles", &Plan::tiles)
        .number("tile_columns", &Plan::tile_columns)
        .number("cluster", &Plan::cluster)
        .choice("residual", &Plan::residual, RESIDUALS)
        .number("shared_bytes", &Plan::shared_bytes)
        .number("packed_bytes", &Plan::packed_bytes)
        .number("workspace_bytes", &Plan::workspace_bytes)
        .made_from_keywords();
    m.def("pack", pack, py::arg("call"), py::arg("plan"), py::arg("stream"),
          "Launch the packing of a call's weights; RuntimeError where that failed.");
    m.def("shape", shape, py::arg("call"), py::arg("plan"), py::kw_only(), py::arg("backward"),
          "What shape.cu is compiled for, as numbers.");
    m.def("run", run, py::arg("call"), py::arg("plan"), py::arg("backward"), py::arg("stream"),
          py::arg("kernel") = 0,
          "Launch a forward or backward call as planned; RuntimeError where that failed.");
    m.def("plan", plan, py::arg("call"), py::kw_only(), py::arg("backward"), "Reads sizes and options alone.");
    m.def("reason", reason, py::arg("plan"), "Why the planner refuses, or None.");
    m.def("build_info", shift_cuda_build_info, "Compiler and architectures of this build.");
    py::list archs;
    for (py::handle arch : py::str(shift_cuda_archs()).attr("split")()) archs.append(arch);
    m.attr("archs") = py::tuple(archs);  // nothing for the emulation
    m.attr("driver_is_too_old") = shift_cuda_driver_is_too_old() != 0;
}
