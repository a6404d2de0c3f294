// The arguments of an operator, as its schema names them: tensors, and sizes that may be dynamic, are inputs of a node;
// all others are its attributes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace deformkit {

struct Argument {
  std::string name;
  bool input, optional;
};

struct Schema {
  std::string name;
  std::vector<Argument> arguments;

  explicit Schema(std::string_view text) : name(text.substr(0, text.find('('))) {
    text = text.substr(name.size() + 1, text.find(')') - name.size() - 1);
    for (size_t end = 0; end != text.npos; text.remove_prefix(end == text.npos ? text.size() : end + 2)) {
      end = text.find(", ");
      const std::string_view argument = text.substr(0, end), type = argument.substr(0, argument.find(' '));
      arguments.push_back({std::string(argument.substr(type.size() + 1)),
                           type.starts_with("Tensor") || type == "SymInt[]", type.ends_with("?")});
    }
  }
};

}  // namespace deformkit
