// The binary. Everything is in run_command_line, which the tests call too.
#include "cli/common.h"

int main(int argc, char** argv) {
    return refrag::run_command_line(argc, argv);
}
