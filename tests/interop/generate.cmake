# Texts of moe-generate against transformers; skips (77) where it is not installed.
add_test(NAME interop.generate_hf COMMAND ${CMAKE_CURRENT_LIST_DIR}/generate_hf.sh)
set_tests_properties(interop.generate_hf PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
  ENVIRONMENT "${MOE_TEST_ENV};MOE_BUILD=${CMAKE_BINARY_DIR}")
