# A few trials of each fault; tests/faults/run.sh --full does all of them.
add_test(NAME faults.short COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/faults/run.sh
  --build ${CMAKE_BINARY_DIR})
set_tests_properties(faults.short PROPERTIES TIMEOUT 900 LABELS slow)
