// What Python's modules have in common: structures whose fields are set by name, and the contract of block.h.
//
// Addresses and sizes cross, never tensors: a module knows no torch, and serves every version of it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "block.h"

namespace shift_module {

namespace py = pybind11;

// An address as Python has it: an int, or None for null.
template <class Pointer>
Pointer address(py::handle value) {
    return value.is_none() ? Pointer{} : reinterpret_cast<Pointer>(value.cast<uintptr_t>());
}

// Binds a structure: Name(field=value, ...), instance.field, and Name.FIELDS, their names. An unknown name is an error.
template <class S>
class Structure {
  public:
    Structure(py::module_& module, const char* name) : type_(module, name, py::module_local()), name_(name) {}

    template <class Owner, class N>  // Owner: S, or what it is derived from
    Structure& number(const char* name, N Owner::* member) {
        return field(name, [=](S& s, py::handle value) { s.*member = value.cast<N>(); },
                     [=](const S& s) -> py::object { return py::cast(s.*member); });
    }
    // A choice is given by its name.
    template <class Owner, size_t N>
    Structure& choice(const char* name, int64_t Owner::* member, const char* const (&names)[N]) {
        const std::string of = name_ + "." + name;
        return field(name, [=, &names](S& s, py::handle value) {
            const std::string chosen = value.cast<std::string>();
            for (size_t i = 0; i < N; i++)
                if (chosen == names[i]) return void(s.*member = i);
            throw py::value_error(of + ": no such choice: " + chosen);
        }, [=, &names](const S& s) -> py::object { return py::cast(names[s.*member]); });
    }
    template <class Owner, class T>
    Structure& pointer(const char* name, T* Owner::* member) {
        return field(name, [=](S& s, py::handle value) { s.*member = address<T*>(value); },
                     [=](const S& s) -> py::object { return py::cast(reinterpret_cast<uintptr_t>(s.*member)); });
    }
    // A list of addresses, of which the structure has a copy.
    template <class Owner, class T>
    Structure& pointers(const char* name, std::vector<T> Owner::* member) {
        return field(name, [=](S& s, py::handle value) {
            std::vector<T> list;
            for (py::handle x : py::reinterpret_borrow<py::sequence>(value)) list.push_back(address<T>(x));
            s.*member = std::move(list);
        }, [=](const S& s) -> py::object { return py::cast((s.*member).size()); });
    }
    // What the calls of all backends have; S: a Call with its list of addresses.
    Structure& call_fields() {
        number("batch", &S::batch).number("seq_len", &S::seq_len).number("most_loops", &S::most_loops);
        number("return_all", &S::return_all).number("n_grad_loops", &S::n_grad_loops);
        number("halting", &S::halting).number("halt_threshold", &S::halt_threshold);
        pointer("e", &S::e).pointer("loops", &S::loops).pointer("lengths", &S::lengths).pointer("rotary", &S::rotary);
        pointers("weights", &S::weight_list);
        pointer("out", &S::out).pointer("boundaries", &S::boundaries).pointer("used", &S::used);
        return pointer("grad_out", &S::grad_out);
    }
    void made_from_keywords() {
        type_.def(py::init([set = setters_, name = name_](const py::kwargs& values) {
            S s{};
            assign(s, set, name, values);
            return s;
        }));
    }
    // Base(...) first, whose fields are all copied.
    template <class Base>
    void made_from() {
        type_.def(py::init([set = setters_, name = name_](const Base& base, const py::kwargs& values) {
            S s{};
            static_cast<Base&>(s) = base;
            assign(s, set, name, values);
            return s;
        }));
        type_.def("copy", [](const S& s) { return s; });
    }

  private:
    typedef std::map<std::string, std::function<void(S&, py::handle)>, std::less<>> Setters;

    static void assign(S& s, const Setters& set, const std::string& name, const py::kwargs& values) {
        for (auto item : values) {
            const char* key = PyUnicode_AsUTF8(item.first.ptr());
            const auto found = set.find(std::string_view(key));
            if (found == set.end()) throw py::type_error(name + " has no field " + key);
            found->second(s, item.second);
        }
    }
    template <class Set, class Get>
    Structure& field(const char* name, Set set, Get get) {
        type_.def_property(name, get, set);
        setters_[name] = set;
        fields_.append(name);
        type_.attr("FIELDS") = py::tuple(fields_);
        return *this;
    }

    py::class_<S> type_;
    std::string name_;
    Setters setters_;
    py::list fields_;
};

template <size_t N>
py::tuple tuple_of(const char* const (&names)[N]) {
    py::tuple tuple(N);
    for (size_t i = 0; i < N; i++) tuple[i] = names[i];
    return tuple;
}

// Block, and the names that block.h gives.
inline void bind_block(py::module_& m) {
    Structure<Block>(m, "Block")
        .number("d_model", &Block::d_model)
        .number("n_heads", &Block::n_heads)
        .number("n_kv_heads", &Block::n_kv_heads)
        .number("head_dim", &Block::head_dim)
        .number("n_layers", &Block::n_layers)
        .number("d_ff", &Block::d_ff)
        .choice("activation", &Block::activation, ACTIVATIONS)
        .choice("norm", &Block::norm, NORMS)
        .choice("norm_placement", &Block::placement, PLACEMENTS)
        .choice("norm_weight", &Block::norm_factor, NORM_FACTORS)
        .choice("position", &Block::position, POSITIONS)
        .choice("injection", &Block::injection, INJECTIONS)
        .number("causal", &Block::causal)
        .number("loop_norm", &Block::loop_norm)
        .number("qk_norm", &Block::qk_norm)
        .number("rotary_pairs", &Block::rotary_pairs)
        .number("norm_eps", &Block::eps)
        .number("residual_scale", &Block::residual_scale)
        .number("window", &Block::window)
        .number("softcap", &Block::softcap)
        .number("attn_scale", &Block::attn_scale)
        .made_from_keywords();
    m.attr("LAYER_WEIGHTS") = tuple_of(LAYER_WEIGHTS);
    m.attr("LOOP_WEIGHTS") = tuple_of(LOOP_WEIGHTS);
}

}  // namespace shift_module
