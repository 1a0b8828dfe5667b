if(MOE_WITH_CUDA)
  moe_test_program(gpu_ops ${CMAKE_CURRENT_LIST_DIR}/gpu_ops.c moe_kernels)
  moe_test_program(gpu_decode ${CMAKE_CURRENT_LIST_DIR}/gpu_decode.c moe_kernels)
endif()
