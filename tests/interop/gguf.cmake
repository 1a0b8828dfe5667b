# Our GGUF files in llama.cpp; skips (77) where it is not installed.
add_test(NAME interop.gguf COMMAND ${CMAKE_CURRENT_LIST_DIR}/gguf.sh)
set_tests_properties(interop.gguf PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
  ENVIRONMENT "${MOE_TEST_ENV};MOE_BUILD=${CMAKE_BINARY_DIR}")
