if(MOE_WITH_CUDA AND "90a" IN_LIST MOE_CUDA_BUILT)
  moe_test_program(experts_sm90 ${CMAKE_CURRENT_LIST_DIR}/experts_sm90.c moe_kernels)
endif()
