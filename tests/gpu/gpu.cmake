# CUDA against the CPU backend. gpu_tests is one program of these tests, of every operation's own and
# of whole steps (one, because each program carries all kernels): easy to take to a machine with a
# GPU, where run.sh starts it. Here its tests skip themselves without a GPU.
if(MOE_WITH_CUDA)
  file(GLOB gpu_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.c
    ${CMAKE_CURRENT_SOURCE_DIR}/kernels/test_*.c ${CMAKE_CURRENT_SOURCE_DIR}/train/test_step.c)
  moe_test_program(gpu_tests "${gpu_sources}" moe_training)
  target_link_libraries(gpu_tests PRIVATE PkgConfig::CRITERION)
  add_test(NAME gpu.agree COMMAND gpu_tests -j1 --filter "gpu_*/*")
endif()
# Runs move between devices: on GPUs by run.sh, here between CPU ranks.
add_test(NAME gpu.moves COMMAND ${CMAKE_CURRENT_LIST_DIR}/moves.sh ${CMAKE_BINARY_DIR}/bin)
set_tests_properties(gpu.moves PROPERTIES TIMEOUT 300
  ENVIRONMENT "${MOE_TEST_ENV};BACKEND=cpu;ONLY=1-2 4-2x2")
