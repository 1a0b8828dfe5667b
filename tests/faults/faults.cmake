# A few trials of each fault; tests/faults/run.sh --full does all of them.
add_test(NAME faults.short COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/faults/run.sh
  --build ${CMAKE_BINARY_DIR})
set_tests_properties(faults.short PROPERTIES TIMEOUT 900 LABELS slow)

# A disk that fails on demand, for LD_PRELOAD. Its replacements must not be inlined checks.
add_library(moe_fault_shim SHARED ${CMAKE_CURRENT_SOURCE_DIR}/faults/shim.c)
target_link_libraries(moe_fault_shim PRIVATE ${CMAKE_DL_LIBS})
target_compile_options(moe_fault_shim PRIVATE -Wall -Wextra -U_FORTIFY_SOURCE)
set_target_properties(moe_fault_shim PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
target_compile_definitions(moe_fault_shim PRIVATE _GNU_SOURCE)

moe_test_program(fault_damage ${CMAKE_CURRENT_SOURCE_DIR}/faults/damage.c moe_training)
